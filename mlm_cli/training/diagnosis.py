"""Where a number that is not finite came from: the first bad layer, rank and samples, found by a second look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlm_cli.parallel.context import ParallelContext
from mlm_cli.training.engine import Batch, Objective, Outcome

_SHOWN_IDS = 16


@dataclass(frozen=True)
class Origin:
    """Equal on all ranks. Empty where it is not known.

    Attributes:
        ranks: that saw it first; tensor ranks pass a bad number on to each other.
        samples: numbers of the samples in the micro-batches concerned.
        layer: module whose output (or whose output's gradient) is the first that is not finite.
    """

    ranks: tuple[int, ...] = ()
    samples: tuple[int, ...] = ()
    layer: str | None = None

    def describe(self) -> str:
        where = f"on rank {listed(self.ranks)}, " if self.ranks else ""
        return f"{where}samples {listed(self.samples)}"


def find_origin(
    model: nn.Module,
    objective: Objective,
    outcomes: Sequence[Outcome],
    batches: Sequence[Batch],
    parallel: ParallelContext,
    *,
    gradient: bool,
) -> Origin:
    """Run the micro-batches of a bad step again, watching every layer. All ranks call; nothing is changed.

    The second run is without dropout, which leaves the random streams where they are. Ranks of one tensor group hold
    parts of one layer, so all ranks run all micro-batches: their collectives stay in step.

    Args:
        gradient: losses are finite, the gradient is not: look at gradients of outputs instead of outputs.
    """
    found: list[_Sighting] = []
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    for number, (outcome, batch) in enumerate(zip(outcomes, batches, strict=True)):
        layer = first_bad_layer(model, objective, batch, gradient=gradient)
        if layer is not None if gradient else not math.isfinite(float(outcome.loss)):
            depth = (parallel.pipeline.rank, len(order) if layer is None else order[layer])
            depth = (-depth[0], -depth[1]) if gradient else depth
            place = (parallel.data.rank, number)
            found.append(_Sighting(place, depth, parallel.world.rank, layer, sample_ids(batch)))
    mine = (found, [number for batch in batches for number in sample_ids(batch)])
    everywhere: list[Any] = [mine]
    if parallel.world.size > 1:
        everywhere = [None] * parallel.world.size
        dist.all_gather_object(everywhere, mine)
    seen: list[_Sighting] = [sighting for sightings, _ in everywhere for sighting in sightings]
    first = {one.place: min(other.depth for other in seen if other.place == one.place) for one in seen}
    seen = [one for one in seen if one.depth == first[one.place]]
    # a gradient that turned bad in no micro-batch did so in their sum: then all samples of the step are suspects
    numbers = {number for one in seen for number in one.samples} or {number for _, ids in everywhere for number in ids}
    layer = next((one.layer for one in seen if one.layer is not None), None)
    return Origin(tuple(sorted({one.rank for one in seen})), tuple(sorted(numbers)), layer)


@dataclass(frozen=True)
class _Sighting:
    """One rank's look at one micro-batch.

    Attributes:
        place: data rank and micro-batch.
        depth: stage and module; smaller is earlier.
    """

    place: tuple[int, int]
    depth: tuple[int, int]
    rank: int
    layer: str | None
    samples: list[int]


def first_bad_layer(model: nn.Module, objective: Objective, batch: Batch, *, gradient: bool = False) -> str | None:
    """Name of the first module, in order of computation, whose output is not finite; None when all are.

    With ``gradient`` the backward pass is looked at, where the first module is the last one of the forward pass. No
    parameter's gradient is touched.
    """
    outputs: list[tuple[str, Tensor]] = []

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and first.is_floating_point():
                outputs.append((name, first))

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    was_training = model.training
    # a layer that is recomputed keeps no graph to look at; a wrapper's modules() are those of what it wraps
    recomputing: list[Any] = [module for module in model.modules() if getattr(module, "recompute", False)]
    model.eval()
    for module in recomputing:
        module.recompute = False
    try:
        with torch.set_grad_enabled(gradient):
            loss, _ = objective(model, batch)
        if not gradient:
            return next((name for name, output in outputs if not torch.isfinite(output).all()), None)
        watched = [(name, output) for name, output in outputs if output.requires_grad]
        # behind the watched outputs of a stage comes what the stage before waits for
        ends = [output for _, output in watched] + getattr(model, "received", [])
        grads = torch.autograd.grad(loss, ends, allow_unused=True)
        bad = [
            name
            for (name, _), grad in zip(watched, grads, strict=False)
            if grad is not None and not torch.isfinite(grad).all()
        ]
        return bad[-1] if bad else None
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
        for module in recomputing:
            module.recompute = True


def sample_ids(batch: Batch) -> list[int]:
    """Numbers of the samples of a micro-batch, where it knows them."""
    return batch["sample_ids"].tolist() if "sample_ids" in batch else []


def listed(numbers: Sequence[int]) -> str:
    """``3``, ``3-9`` or ``3, 5, 8``; long lists are cut."""
    if not numbers:
        return "unknown"
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}-{numbers[-1]}"
    shown = ", ".join(str(number) for number in numbers[:_SHOWN_IDS])
    return shown + (f" and {len(numbers) - _SHOWN_IDS} more" if len(numbers) > _SHOWN_IDS else "")
