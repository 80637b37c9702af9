"""What happens to a step whose loss or gradient is bad: it is never applied to the weights; then the policy decides.

A loss is bad when it is not finite, or when it spikes: lies ``spike_zscore`` robust standard deviations above the
median of the losses before it (median and MAD, Leys et al. 2013). Everything that decides is part of the position in
training and saved with it, so a resumed run decides alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from torch import nn

from mlm_cli import log
from mlm_cli.checkpoint.state import Position
from mlm_cli.errors import NumericsError
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.training.agreement import StepReport
from mlm_cli.training.diagnosis import Origin, find_origin, sample_ids
from mlm_cli.training.engine import Batch, Objective, Outcome

_MAD_TO_SIGMA = 1.4826  # of a normal distribution
_MIN_HISTORY = 10  # losses before the first verdict
_FLAT = 1e-3  # a spread below this share of the median is taken for noise
_RECENT, _COUNT = "recent_losses", "bad_steps"  # in Position.extra
_HINT = "the last checkpoint is good: resume with a lower optimizer.lr, longer warm-up, or train.precision=fp32"


@dataclass(frozen=True)
class Policy:
    """``train.on_bad_loss`` and its companions; see the recipe's schema."""

    action: Literal["stop", "skip", "rollback"] = "stop"
    spike_zscore: float = 0.0
    spike_window: int = 100
    budget: int = 10


@dataclass(frozen=True)
class Trouble:
    """A bad step. ``value``: the loss, or the gradient norm."""

    step: int
    kind: Literal["loss", "spike", "gradient"]
    value: float
    zscore: float | None = None


@dataclass
class Numerics:
    """Judges every step, and carries out the policy. All ranks call every method together, with equal reports.

    Args:
        rollback: puts the newest sound checkpoint back into the engine and returns its position.
    """

    policy: Policy = Policy()
    rollback: Callable[[], Position] | None = None
    _pending: dict[str, Any] = field(default_factory=dict)

    def judge(self, step: int, report: StepReport, position: Position) -> Trouble | None:
        """Is the loss of ``step`` fit to learn from?"""
        if not report.finite or not math.isfinite(report.loss):
            return Trouble(step, "loss", math.nan)
        zscore = self._zscore(report.loss, position)
        return Trouble(step, "spike", report.loss, zscore) if zscore > self.policy.spike_zscore > 0 else None

    def accept(self, loss: float, position: Position) -> Position:
        """The position with a good loss remembered."""
        if not self.policy.spike_zscore:
            return position
        recent = [*position.extra.get(_RECENT, []), loss][-self.policy.spike_window :]
        return Position(position.step, position.consumed_samples, {**position.extra, _RECENT: recent})

    def handle(
        self,
        trouble: Trouble,
        position: Position,
        samples: int,
        *,
        model: nn.Module,
        objective: Objective,
        outcomes: Sequence[Outcome],
        batches: Sequence[Batch],
        parallel: ParallelContext,
    ) -> Position:
        """Stop, or go on without the bad step; returns where training stands then.

        After ``skip`` that is behind the step, without an update. After ``rollback`` it is the last checkpoint's step,
        but behind the samples of the bad step: none since the checkpoint is read again.

        Args:
            position: before the step.
            samples: of the step, over all ranks.

        Raises:
            NumericsError: the policy is to stop, or its budget is used up.
        """
        origin = Origin()
        if trouble.kind != "spike":
            origin = find_origin(model, objective, outcomes, batches, parallel, gradient=trouble.kind == "gradient")
            if trouble.kind == "loss":
                trouble = Trouble(trouble.step, "loss", _worst(outcomes, trouble.value))
        else:
            first = position.consumed_samples
            known = sample_ids(batches[0])
            origin = Origin(samples=tuple(range(first, first + samples)) if known else ())
        count = int(position.extra.get(_COUNT, 0)) + 1
        message = _message(trouble, origin)
        if self.policy.action == "stop":
            raise NumericsError(f"{message}; the step was not taken", hint=_HINT)
        if count > self.policy.budget:
            raise NumericsError(
                f"{message}; the step was not taken, and train.max_bad_steps {self.policy.budget} are used up",
                hint="many bad steps are no accident of the data: " + _HINT,
            )
        behind = position.consumed_samples + samples
        self._pending = {"bad_step": trouble.step, "bad": trouble.kind, "bad_layer": origin.layer, "bad_steps": count}
        if self.policy.action == "skip":
            log.warn(f"{message}; the batch is skipped ({count} of at most {self.policy.budget})")
            return Position(trouble.step, behind, {**position.extra, _COUNT: count})
        assert self.rollback is not None
        back = self.rollback()
        self._pending["skipped_samples"] = [back.consumed_samples, behind]
        log.warn(
            f"{message}; back to step {back.step:,}, without samples {back.consumed_samples:,} to {behind - 1:,} "
            f"({count} of at most {self.policy.budget})"
        )
        return Position(back.step, behind, {**back.extra, _COUNT: count})

    def take_record(self) -> dict[str, Any]:
        """What the next record of ``metrics.jsonl`` must tell of trouble before it; given once."""
        told, self._pending = self._pending, {}
        return told

    def _zscore(self, loss: float, position: Position) -> float:
        recent = position.extra.get(_RECENT, [])
        if not self.policy.spike_zscore or len(recent) < _MIN_HISTORY:
            return 0.0
        middle = median(recent)
        spread = _MAD_TO_SIGMA * median(abs(one - middle) for one in recent)
        return (loss - middle) / max(spread, _FLAT * abs(middle), 1e-12)


def _worst(outcomes: Sequence[Outcome], otherwise: float) -> float:
    return next((float(one.loss) for one in outcomes if not math.isfinite(float(one.loss))), otherwise)


def _message(trouble: Trouble, origin: Origin) -> str:
    layer = f"; first bad layer: {origin.layer}" if origin.layer is not None else ""
    if trouble.kind == "spike":
        return (
            f"step {trouble.step}: the loss spikes to {trouble.value:.4f} ({trouble.zscore:.1f} robust standard "
            f"deviations above the last ones), {origin.describe()}"
        )
    if trouble.kind == "gradient":
        return f"step {trouble.step}: the gradient norm is {trouble.value} (loss finite), {origin.describe()}{layer}"
    return f"step {trouble.step}: the loss is {trouble.value} {origin.describe()}{layer}"
