"""``state/``: what resuming needs beyond the weights of ``model/``, as safetensors without pickle.

Each rank writes ``rank-XXXXX.safetensors``: of every parameter the part that this rank's optimizer owns (a flat range
of the rank's tensor slice) of the float32 master weight and both Adam moments; the state of its random generators; and
as JSON metadata the layout, so that any other layout can be assembled from the files of all ranks.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mlm_cli.checkpoint.manifest import FileRecord
from mlm_cli.checkpoint.tensor_file import write_tensors
from mlm_cli.errors import CheckpointError
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.shard import Shard

KINDS = ("master", "exp_avg", "exp_avg_sq")
METADATA_KEY = "mlm_state"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter's optimizer state that this rank owns.

    Attributes:
        name: of the parameter, as in ``named_parameters``.
        shape: of this rank's tensor slice of the parameter.
        shard: how that slice was cut; None: not sliced.
        start: where the fragment begins in the flattened slice.
        copy: another stage owns the parameter too, and counts (the tied word embedding).
        tensors: ``KINDS`` -> the live flat float32 tensors of the optimizer; writing to them loads a state.
    """

    name: str
    shape: tuple[int, ...]
    shard: Shard | None
    start: int
    tensors: dict[str, Tensor]
    copy: bool = False

    @property
    def numel(self) -> int:
        return self.tensors["master"].numel()


class LossScaler(Protocol):
    """A loss scale that moves (``training.loss_scale``)."""

    def state(self) -> dict[str, float]: ...

    def load(self, state: Mapping[str, float]) -> None: ...


class HasState(Protocol):
    """What a training engine shows of its state (``training.engine.Engine``)."""

    updates: int

    @property
    def scaler(self) -> LossScaler | None: ...

    def fragments(self) -> Sequence[Fragment]: ...

    def refresh(self) -> None: ...


class Streams(Protocol):
    """Random streams of the model (``parallel.random.RandomStreams``)."""

    def get_state(self) -> dict[str, Tensor]: ...

    def set_state(self, state: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class Position:
    """Where training stands: what the loop needs to go on.

    ``extra`` holds plain JSON values of the job, such as the best score of a fine-tuning run.
    """

    step: int
    consumed_samples: int
    extra: dict[str, Any] = field(default_factory=dict)

    def after(self, step: int, samples: int, **extra: Any) -> Position:
        """The position after another ``samples`` samples, with some of ``extra`` changed."""
        return Position(step, self.consumed_samples + samples, {**self.extra, **extra})


def rank_file(rank: int) -> str:
    return f"state/rank-{rank:05d}.safetensors"


def layout_of(parallel: ParallelContext) -> dict[str, int]:
    return {
        "world": parallel.world.size,
        "tensor": parallel.tensor.size,
        "data": parallel.data.size,
        "pipeline": parallel.pipeline.size,
        "context": parallel.context.size,
    }


def describe_layout(written: Mapping[str, int]) -> str:
    """``data 2 x pipeline 1 x tensor 2``."""
    shown = {axis: size for axis, size in written.items() if axis != "world" and (axis != "context" or size > 1)}
    return " x ".join(f"{axis} {size}" for axis, size in shown.items())


def is_layout(written: Mapping[str, int], parallel: ParallelContext) -> bool:
    """Was a checkpoint written on this very layout? An axis that an older version did not know had one rank."""
    return all(written.get(axis, 1) == size for axis, size in layout_of(parallel).items())


def state_bytes(engine: HasState) -> int:
    """Bytes this rank will write, for the free-space check."""
    return sum(4 * fragment.numel * len(KINDS) for fragment in engine.fragments()) + (1 << 16)


@dataclass(frozen=True)
class StateFile:
    """What one rank's file will hold. ``write`` needs nothing but the file system."""

    name: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    def write(self, folder: Path) -> FileRecord:
        """Write it below the checkpoint ``folder``; returns its size and hash."""
        return write_tensors(folder / self.name, self.tensors, self.metadata)


def collect_state(
    engine: HasState, streams: Streams | None, position: Position, parallel: ParallelContext, *, copy: bool = False
) -> StateFile:
    """This rank's state as it is now; with ``copy`` in memory of its own, so that training may go on."""
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, Any] = {}
    for fragment in engine.fragments():
        parameters[fragment.name] = {
            "start": fragment.start,
            "numel": fragment.numel,
            "shape": list(fragment.shape),
            "copy": fragment.copy,
            "shard": None if fragment.shard is None else [fragment.shard.dim, fragment.shard.blocks],
        }
        if fragment.numel:
            live = {f"{kind}/{fragment.name}": fragment.tensors[kind] for kind in KINDS}
            tensors |= {name: tensor.detach().to("cpu", copy=True) for name, tensor in live.items()} if copy else live
    rng_tensors, rng_values = _rng_state(parallel.device, streams)
    tensors |= rng_tensors
    about = {
        "version": FORMAT_VERSION,
        "step": position.step,
        "consumed_samples": position.consumed_samples,
        "updates": engine.updates,
        "extra": position.extra,
        "loss_scale": None if engine.scaler is None else engine.scaler.state(),
        "layout": layout_of(parallel),
        "place": {
            "world": parallel.world.rank,
            "tensor": parallel.tensor.rank,
            "data": parallel.data.rank,
            "pipeline": parallel.pipeline.rank,
            "context": parallel.context.rank,
        },
        "parameters": parameters,
        "rng": rng_values,
    }
    metadata = {METADATA_KEY: json.dumps(about, sort_keys=True)}
    return StateFile(rank_file(parallel.world.rank), tensors, metadata)


def read_about(path: Path) -> tuple[dict[str, Any], Any]:
    """The metadata of a rank's file and its open safetensors handle.

    Raises:
        CheckpointError: not a safetensors file, or not one of these.
    """
    from safetensors import SafetensorError, safe_open

    try:
        handle = safe_open(str(path), framework="pt")
        about = json.loads((handle.metadata() or {})[METADATA_KEY])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is not a training state ({type(error).__name__}: {error})") from None
    if about["version"] > FORMAT_VERSION:
        raise CheckpointError(f"{path} has version {about['version']}; this mlm reads up to {FORMAT_VERSION}")
    return about, handle


def restore_rng(about: dict[str, Any], handle: Any, device: torch.device, streams: Streams | None) -> None:
    """Put back what ``write_state`` stored of every random generator."""
    values = about["rng"]
    version, internal, gauss = values["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(("MT19937", handle.get_tensor("rng/numpy").numpy().view(np.uint32), *values["numpy"]))
    torch.set_rng_state(handle.get_tensor("rng/torch"))
    if device.type == "cuda" and "rng/cuda" in handle.keys():  # noqa: SIM118 - not a dict
        torch.cuda.set_rng_state(handle.get_tensor("rng/cuda"), device)
    names = [key for key in handle.keys() if key.startswith("rng/stream/")]  # noqa: SIM118 - not a dict
    stored = {name.removeprefix("rng/stream/"): handle.get_tensor(name) for name in names}
    if streams is not None and stored:
        streams.set_state(stored)


def _rng_state(device: torch.device, streams: Streams | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and JSON values of the generators whose state is no tensor."""
    generator = np.random.get_state(legacy=False)
    assert isinstance(generator, dict)
    keys = generator["state"]["key"].view(np.int32).copy()
    tensors = {"rng/torch": torch.get_rng_state(), "rng/numpy": torch.from_numpy(keys)}
    if device.type == "cuda":
        tensors["rng/cuda"] = torch.cuda.get_rng_state(device)
    for name, state in (streams.get_state() if streams is not None else {}).items():
        tensors[f"rng/stream/{name}"] = state
    version, internal, gauss = random.getstate()
    values = {
        "python": [version, list(internal), gauss],
        "numpy": [int(generator["state"]["pos"]), int(generator["has_gauss"]), float(generator["gauss"])],
    }
    return tensors, values
