"""What all ranks must know of a step before its update: one loss, and whether anybody was told to stop or saw a NaN."""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mlm_cli.errors import NumericsError
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.training.engine import Batch, Outcome
from mlm_cli.training.stop import SIGNALS, StopFlag

_SHOWN_IDS = 16


@dataclass(frozen=True)
class StepReport:
    """Equal on all ranks.

    Attributes:
        loss: mean over micro-batches and data ranks.
        tokens: of the step, over all data ranks.
        finite: no micro-batch anywhere had a loss that is not a finite number.
        stop: the signal that some rank received.
    """

    loss: float
    tokens: int
    finite: bool
    stop: signal.Signals | None


def agree_on_step(outcomes: Sequence[Outcome], stop: StopFlag, parallel: ParallelContext) -> StepReport:
    """Sum a handful of numbers over all ranks: the one wait of a step beside those of the gradients."""
    losses = torch.stack([outcome.loss for outcome in outcomes]).double()
    local = losses.tolist()  # waits for the device
    bad = sum(not math.isfinite(loss) for loss in local)
    tokens = sum(float(outcome.sums.get("tokens", 0)) for outcome in outcomes)
    values = [sum(local) / len(local) if not bad else 0.0, tokens, float(bad), *stop.flags()]
    # Tensor ranks saw the same loss and tokens: a sum over the world counts each data rank that often.
    summed = parallel.world.all_reduce_(torch.tensor(values, dtype=torch.float64, device=parallel.device)).tolist()
    copies = parallel.world.size / parallel.data.size
    return StepReport(
        loss=summed[0] / parallel.world.size,
        tokens=round(summed[1] / copies),
        finite=summed[2] == 0,
        stop=stop.agreed(summed[3 : 3 + len(SIGNALS)]),
    )


def bad_loss(
    step: int, outcomes: Sequence[Outcome], batches: Sequence[Batch], parallel: ParallelContext
) -> NumericsError:
    """The error for a loss that is not finite, naming samples and ranks. All ranks call."""
    found = [
        (parallel.world.rank, float(outcome.loss), batch["sample_ids"].tolist() if "sample_ids" in batch else [])
        for outcome, batch in zip(outcomes, batches, strict=True)
        if not math.isfinite(float(outcome.loss))
    ]
    everywhere: list[Any] = [found]
    if parallel.world.size > 1:
        everywhere = [None] * parallel.world.size
        dist.all_gather_object(everywhere, found)
    flat = [entry for entries in everywhere for entry in entries]
    ranks = sorted({rank for rank, _, _ in flat})
    ids = sorted({number for _, _, numbers in flat for number in numbers})
    value = flat[0][1] if flat else math.nan
    return NumericsError(
        f"step {step}: the loss is {value} on rank {_listed(ranks)}, samples {_listed(ids)}; the step was not taken",
        hint=_HINT,
    )


def bad_gradient(step: int, norm: float, batches: Sequence[Batch]) -> NumericsError:
    """The error for a gradient norm that is not finite; every rank computed the same one."""
    ids = sorted({number for batch in batches if "sample_ids" in batch for number in batch["sample_ids"].tolist()})
    return NumericsError(
        f"step {step}: the gradient norm is {norm} (loss finite), samples {_listed(ids)}; the step was not taken",
        hint=_HINT,
    )


_HINT = "the last checkpoint is good: resume with a lower optimizer.lr, longer warm-up, or train.precision=fp32"


def _listed(numbers: Sequence[int]) -> str:
    if not numbers:
        return "unknown"
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}-{numbers[-1]}"
    shown = ", ".join(str(number) for number in numbers[:_SHOWN_IDS])
    return shown + (f" and {len(numbers) - _SHOWN_IDS} more" if len(numbers) > _SHOWN_IDS else "")
