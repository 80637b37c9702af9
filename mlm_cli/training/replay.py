"""Taking steps of a run again without leaving a trace, and comparing them with what the run wrote down.

The steps go through the very loop that trained; only checkpoints and records have nowhere to go.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlm_cli.checkpoint import agree
from mlm_cli.checkpoint.folder import RunFolder, step_name
from mlm_cli.checkpoint.load import Found, find_newest, inspect, is_stored_as, open_checkpoint
from mlm_cli.checkpoint.state import KINDS, HasState, Position, rank_file, read_about
from mlm_cli.errors import CheckpointError, UsageError
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.training.engine import Batch

_COMPARED = ("loss", "grad_norm")


@dataclass(frozen=True)
class Difference:
    """The first number that came out otherwise than it was written down."""

    step: int
    what: str
    recorded: float
    replayed: float | None


@dataclass
class Report:
    """What a replay found.

    Attributes:
        step: taken again, from the checkpoint of step ``from_step`` (0: the beginning of the run).
        loss, grad_norm, lr: of the step now; None for a step that was passed over.
        recorded: the same as the run wrote them down; None where it did not.
        samples: numbers of the samples of the step, all data ranks together.
        steps_compared: steps on the way whose loss was on record.
        difference: first step that differs; None: all the same, to the last bit.
        state_differs: parameters whose optimizer state differs from the checkpoint of ``step``; None: not compared.
        bad: what was wrong with a step that was passed over.
        start_layout: of the ranks that wrote the checkpoint it starts from; None: those that take the steps again.
    """

    step: int
    from_step: int
    loss: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    recorded: dict[str, float | None] = field(default_factory=dict)
    samples: list[int] = field(default_factory=list)
    steps_compared: int = 0
    difference: Difference | None = None
    state_differs: list[str] | None = None
    bad: dict[str, Any] | None = None
    start_layout: str | None = None

    @property
    def same(self) -> bool:
        return self.difference is None and not self.state_differs

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "same": self.same}

    def as_text(self) -> str:
        """For people; the numbers with all their digits, so that they can be compared by eye."""
        origin = step_name(self.from_step) if self.from_step else "the beginning"
        lines = [f"step {self.step}, replayed from {origin}"]
        for name in (*_COMPARED, "lr"):
            value, before = getattr(self, name), self.recorded.get(name)
            known = "" if before is None else f"   recorded {before!r}{' (the same)' if before == value else ''}"
            lines.append(f"{name:<10}{value!r}{known}")
        lines.append(f"samples   {_ranges(self.samples)}")
        if self.bad:
            lines.append("passed over: " + ", ".join(f"{key} {value}" for key, value in self.bad.items()))
        if self.steps_compared:
            lines.append(f"compared  {self.steps_compared} steps on record")
        return "\n".join(lines)


class Nowhere:
    """A checkpointer (``training.loop.Saves``) that keeps only where training stood when it was asked to save."""

    writing = False

    def __init__(self) -> None:
        self.position: Position | None = None

    def finish(self) -> None:
        return None

    def save(self, position: Position, metrics: dict[str, float] | None = None, *, wait: bool = True) -> None:
        self.position = position


class Recorder:
    """A monitor (``training.loop.Watches``) that keeps the records in memory, the newest of each step."""

    def __init__(self, supply: Listed) -> None:
        self.supply = supply
        self.records: dict[int, dict[str, Any]] = {}

    def begin_step(self) -> None:
        self.supply.given = []

    def waiting_for_data(self) -> AbstractContextManager[None]:
        return nullcontext()

    def end_step(self, tokens: int) -> None:
        pass

    def record(self, step: int, values: Mapping[str, Any], *, force: bool = False) -> None:
        self.records[step] = dict(values)

    def went_back(self, step: int) -> None:
        self.records = {known: values for known, values in self.records.items() if known <= step}

    def saved(self, saved: Any) -> None:
        pass


class Listed:
    """Micro-batches on their way to the engine, and the sample numbers of those of the last step.

    A step asks for its micro-batches one after the other and then calls the engine; ``Recorder.begin_step`` marks where
    one begins.
    """

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches = batches
        self.given: list[int] = []

    def __iter__(self) -> Listed:
        return self

    def __next__(self) -> Batch:
        batch = next(self.batches)
        ids = batch.get("sample_ids")
        self.given += [] if ids is None else ids.tolist()
        return batch

    def everywhere(self, parallel: ParallelContext) -> list[int]:
        """Samples of the step on every rank, each once, ascending. All ranks call."""
        everywhere: list[Any] = [self.given]
        if parallel.world.size > 1:
            everywhere = [None] * parallel.world.size
            dist.all_gather_object(everywhere, self.given)
        return sorted({number for ids in everywhere for number in ids})


def find_start(run: RunFolder, step: int, resume: str) -> Found | None:
    """The newest sound checkpoint before ``step``; None: the beginning of the run. All ranks call.

    Args:
        resume: the recipe's ``checkpoint.resume``: a run may have begun from a checkpoint elsewhere.
    """
    for before in reversed([known for known in agree.on_rank_zero(run.steps) if known < step]):
        found, _ = inspect(run.checkpoint(before))
        if found is not None:
            return found
    elsewhere = Path(resume).expanduser().absolute()
    if resume in ("auto", "never") or elsewhere.parent == run.path:
        return None
    within = RunFolder(elsewhere)
    return find_newest(within) if within.steps() else open_checkpoint(elsewhere)


def where_it_went_on(beginning: Position, target: int, recorded: Mapping[int, Mapping[str, Any]]) -> Position:
    """``beginning``, or behind the samples that the run left out after it had gone back there from a step that is not
    taken again on the way to ``target``."""
    record = recorded.get(beginning.step + 1, {})
    left_out = record.get("skipped_samples") or [None, 0]
    if left_out[0] != beginning.consumed_samples or record.get("bad_step", 0) <= target:
        return beginning
    return Position(beginning.step, int(left_out[1]), beginning.extra)


def find_verified(run: RunFolder) -> Found:
    """The newest checkpoint, which must be sound. All ranks call.

    Raises:
        UsageError: there is none.
        CheckpointError: it is damaged.
    """
    steps = agree.on_rank_zero(run.steps)
    if not steps:
        raise UsageError(f"{run} holds no checkpoint to verify", hint="name a run folder that holds step-* folders")
    found, damage = inspect(run.checkpoint(steps[-1]))
    if found is None:
        raise CheckpointError(f"{run.checkpoint(steps[-1])} is damaged: {'; '.join(damage)}")
    return found


def read_records(run: RunFolder) -> dict[int, dict[str, Any]]:
    """``metrics.jsonl`` by step; torn lines are passed over."""
    records: dict[int, dict[str, Any]] = {}
    try:
        lines = run.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return records
    for line in lines:
        try:
            record = json.loads(line)
            records[int(record["step"])] = record
        except (ValueError, KeyError, TypeError):
            continue
    return records


def first_difference(
    replayed: Mapping[int, Mapping[str, Any]], recorded: Mapping[int, Mapping[str, Any]]
) -> tuple[Difference | None, int]:
    """The first number on record that came out otherwise, bit for bit, and how many steps could be compared.

    JSON writes the shortest decimals that read back to the same float64, so equal means equal bits.
    """
    compared = 0
    for step in sorted(replayed):
        before = recorded.get(step, {})
        known = [name for name in _COMPARED if before.get(name) is not None]
        compared += bool(known)
        for name in ("lr", *known):
            if before.get(name) is not None and before[name] != replayed[step].get(name):
                return Difference(step, name, before[name], replayed[step].get(name)), compared
    return None, compared


def differing_state(found: Found, engine: HasState, parallel: ParallelContext) -> list[str]:
    """Names of the parameters whose master weight or moments differ in a bit from a checkpoint of the same layout.

    Raises:
        UsageError: the ranks share the state out otherwise than those that wrote it.
    """
    about, handle = read_about(found.folder / rank_file(parallel.world.rank))
    agree.all_succeed(lambda: _check_stored(found, engine, about))
    mine = [
        fragment.name
        for fragment in engine.fragments()
        if any(
            not _same_bits(fragment.tensors[kind], handle.get_tensor(f"{kind}/{fragment.name}"))
            for kind in (KINDS if fragment.numel else ())
        )
    ]
    everywhere: list[Any] = [mine]
    if parallel.world.size > 1:
        everywhere = [None] * parallel.world.size
        dist.all_gather_object(everywhere, mine)
    return sorted({name for names in everywhere for name in names})


def _check_stored(found: Found, engine: HasState, about: dict[str, Any]) -> None:
    if not all(is_stored_as(fragment, about) for fragment in engine.fragments()):
        raise UsageError(
            f"{found.folder} was written with another parallel.zero or train.engine; only the same give the same bits",
            hint="name what it was written with, such as parallel.zero=1",
        )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    one = one.detach().cpu().contiguous()
    return one.shape == other.shape and torch.equal(one.view(torch.int32), other.contiguous().view(torch.int32))


def _ranges(numbers: list[int]) -> str:
    """``3-9, 14``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
