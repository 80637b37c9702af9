"""What all ranks must know of a step before its update: one loss, and whether anybody was told to stop or saw a NaN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mlm_cli.parallel.context import ParallelContext
from mlm_cli.training.engine import Outcome
from mlm_cli.training.stop import CAUSES, Cause, StopFlag


@dataclass(frozen=True)
class StepReport:
    """Equal on all ranks.

    Attributes:
        loss: mean over micro-batches and data ranks.
        tokens: of the step, over all data ranks.
        writing: some rank still writes a checkpoint in the background.
        finite: no micro-batch anywhere had a loss that is not a finite number.
        stop: the signal that some rank received, or the end of its time.
    """

    loss: float
    tokens: int
    finite: bool
    stop: Cause | None
    writing: bool = False


def agree_on_step(
    outcomes: Sequence[Outcome], stop: StopFlag, parallel: ParallelContext, *, writing: bool = False
) -> StepReport:
    """Sum a handful of numbers over all ranks: the one wait of a step beside those of the gradients."""
    losses = torch.stack([outcome.loss for outcome in outcomes]).double()
    local = losses.tolist()  # waits for the device
    bad = sum(not math.isfinite(loss) for loss in local)
    tokens = sum(float(outcome.sums.get("tokens", 0)) for outcome in outcomes)
    values = [sum(local) / len(local) if not bad else 0.0, tokens, float(bad), *stop.flags(), float(writing)]
    # Tensor ranks saw the same loss and tokens: a sum over the world counts each data rank that often.
    summed = parallel.world.all_reduce_(torch.tensor(values, dtype=torch.float64, device=parallel.device)).tolist()
    copies = parallel.world.size / parallel.data.size
    return StepReport(
        loss=summed[0] / parallel.world.size,
        tokens=round(summed[1] / copies),
        finite=summed[2] == 0,
        stop=stop.agreed(summed[3 : 3 + len(CAUSES)]),
        writing=summed[-1] > 0,
    )
