"""The training loop. Everything swappable is built before it starts; it knows no task, no layout and no file format."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from mlm_cli import heartbeat
from mlm_cli.checkpoint.save import Saved
from mlm_cli.checkpoint.state import Position
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.training.agreement import agree_on_step
from mlm_cli.training.engine import Batch, Engine, Objective
from mlm_cli.training.numerics import Numerics, Trouble
from mlm_cli.training.stop import Cause, Interrupted, StopFlag

# evaluator(model) -> values for the step's record, equal on all ranks, such as {"valid_loss": 2.5}
Evaluator = Callable[[Any], dict[str, float]]


class Saves(Protocol):
    """Where checkpoints go (``checkpoint.save.Checkpointer``)."""

    @property
    def writing(self) -> bool: ...

    def finish(self) -> Saved | None: ...

    def save(
        self, position: Position, metrics: dict[str, float] | None = None, *, wait: bool = True
    ) -> Saved | None: ...


class Watches(Protocol):
    """Where the numbers go (``training.monitor.Monitor``)."""

    def begin_step(self) -> None: ...

    def waiting_for_data(self) -> AbstractContextManager[None]: ...

    def end_step(self, tokens: int) -> None: ...

    def due(self, step: int) -> bool: ...

    def record(self, step: int, values: Mapping[str, Any], *, force: bool = False) -> None: ...

    def went_back(self, step: int) -> None: ...

    def saved(self, saved: Saved | None) -> None: ...


@dataclass(frozen=True)
class Plan:
    """How long to train, and when to do what. ``every``: 0 means only at the end (checkpoints) or never (evaluation).

    Attributes:
        steps: updates of the whole run, counted from its very beginning.
        accumulation: micro-batches of one update on this rank.
        global_batch_size: samples of one update over all ranks.
        batch_at: consumed samples -> samples of the next update, where batches grow; ``accumulation`` is that of whole
            ones.
        checkpoint_when: given an evaluation's values, also save now? For keeping the best of a fine-tuning run.
    """

    steps: int
    accumulation: int
    global_batch_size: int
    checkpoint_every: int = 0
    evaluate_every: int = 0
    checkpoint_when: Callable[[int, dict[str, float]], bool] | None = None
    batch_at: Callable[[int], int] | None = None

    def batch(self, consumed_samples: int) -> tuple[int, int]:
        """(samples, micro-batches of this rank) of the update after ``consumed_samples``."""
        samples = self.global_batch_size if self.batch_at is None else self.batch_at(consumed_samples)
        return samples, samples * self.accumulation // self.global_batch_size


def train(
    plan: Plan,
    engine: Engine,
    batches: Iterator[Batch],
    objective: Objective,
    schedule: Callable[[int], float],
    *,
    start: Position,
    parallel: ParallelContext,
    evaluator: Evaluator | None,
    checkpointer: Saves,
    monitor: Watches,
    stop: StopFlag,
    numerics: Numerics | None = None,
    statistics: Callable[[], dict[str, float]] | None = None,
) -> tuple[Position, Cause | None]:
    """Train from ``start`` to ``plan.steps`` or until told to stop; the last position is always saved.

    Returns where training stands, and what stopped it (None: it is finished). A loss or gradient that is bad
    is never applied to the weights; raises ``NumericsError`` where ``numerics`` does not go on.
    """
    position, numerics, beating = start, numerics or Numerics(), _beating(objective)
    if (cause := stop.agree(parallel)) is not None:  # while everything was being loaded
        return position, cause
    while position.step < plan.steps:
        step, lr = position.step + 1, schedule(position.step + 1)
        monitor.begin_step()

        # the micro-batches of this rank
        with monitor.waiting_for_data():
            samples, accumulation = plan.batch(position.consumed_samples)
            micro_batches = [_to_device(next(batches), parallel) for _ in range(accumulation)]

        # forward and backward of each; gradients add up in the engine
        outcomes = engine.accumulate(beating, micro_batches)

        # every rank learns the mean loss, and whether anyone saw a NaN or a signal (host sync)
        report = agree_on_step(outcomes, stop, parallel, writing=checkpointer.writing)
        trouble = numerics.judge(step, report, position)

        # the update: clip, AdamW; a norm that is not finite leaves the weights alone (host sync)
        if trouble is None:
            grad_norm = engine.step(lr)
            trouble = None if math.isfinite(grad_norm) or engine.overflowed else Trouble(step, "gradient", grad_norm)
        else:
            engine.discard()

        # where training stands now; after trouble: behind the step without its update, or back at a checkpoint
        if trouble is None:
            learned = (
                0 if engine.overflowed else report.tokens
            )  # of float16: the update is passed over, the batch is fine
            tokens = int(position.extra.get("tokens", 0)) + learned
            position = position.after(step, samples, tokens=tokens)
            position = numerics.accept(report.loss, position)
        else:
            monitor.saved(checkpointer.finish())
            position = numerics.handle(
                trouble,
                position,
                samples,
                model=engine.model,
                objective=objective,
                outcomes=outcomes,
                batches=micro_batches,
                parallel=parallel,
            )
            if position.step < step:
                monitor.went_back(position.step)
                if (cause := report.stop) is not None:
                    return position, cause
                continue
        monitor.end_step(report.tokens)
        heartbeat.first_step_done()

        # validation
        cause, values = report.stop, {}
        if evaluator is not None and _due(step, plan.evaluate_every, step == plan.steps) and cause is None:
            try:
                values = evaluator(engine.model)
            except Interrupted as interrupted:
                cause = interrupted.cause
        last = step == plan.steps or cause is not None
        known: dict[str, float] = {"skipped": True}
        if trouble is None:
            known = {"loss": report.loss, **({"overflow": True} if engine.overflowed else {"grad_norm": grad_norm})}
        if engine.scaler is not None:
            known["loss_scale"] = engine.scaler.scale
        told = numerics.take_record()
        if statistics is not None and (values or last or monitor.due(step)):
            told = {**told, **statistics()}
        record = {**known, "lr": lr, "tokens": position.extra.get("tokens", 0), **values, **told}
        monitor.record(step, record, force=bool(values or told) or last)

        # checkpoint; one written in the background is complete as soon as every rank has written its part
        if not report.writing:
            monitor.saved(checkpointer.finish())
        wanted = plan.checkpoint_when is not None and bool(values) and plan.checkpoint_when(step, values)
        if last or wanted or _due(step, plan.checkpoint_every, False):
            metrics = {**(known if trouble is None else {}), "lr": lr, **values}
            monitor.saved(checkpointer.save(position, metrics, wait=last))
        if cause is not None:
            return position, cause
    return position, None


def _due(step: int, every: int, at_end: bool) -> bool:
    return every > 0 and (step % every == 0 or at_end)


def _to_device(batch: Batch, parallel: ParallelContext) -> Batch:
    return {name: tensor.to(parallel.device, non_blocking=True) for name, tensor in batch.items()}


def _beating(objective: Objective) -> Objective:
    """The objective, giving a sign of life with every micro-batch."""

    def beating(model: Any, batch: Batch) -> Any:
        heartbeat.beat()
        return objective(model, batch)

    return beating
