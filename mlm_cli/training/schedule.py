"""Learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a decay from ``lr`` to ``min_lr``.

    ``schedule(step)`` is the rate of update number ``step``, counted from 1. Warm-up reaches ``lr`` at step
    ``warmup_steps``; decays reach ``min_lr`` at the last step and stay there:

    - ``cosine``, ``linear``: over ``warmup_steps .. decay_steps`` (Loshchilov & Hutter 2017 without restarts);
    - ``wsd``: constant, then down in a straight line over the last ``decay_steps`` of ``steps``
      (warm-up, stable, decay: Hu et al. 2024, MiniCPM, section 4);
    - ``constant``: none.

    Args:
        steps: updates of the whole run.
        decay_steps: unset: ``steps``; for ``wsd`` a tenth of them.
    """

    lr: float
    steps: int
    warmup_steps: int = 0
    decay: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    decay_steps: int | None = None
    min_lr: float = 0.0

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.lr * step / self.warmup_steps
        done = self._share_decayed(step)
        if self.decay == "cosine":
            done = 0.5 * (1.0 - math.cos(math.pi * done))
        return self.lr - (self.lr - self.min_lr) * done

    def _share_decayed(self, step: int) -> float:
        """From 0 (decay has not begun) to 1 (it is over)."""
        if self.decay == "constant":
            return 0.0
        if self.decay == "wsd":
            length = self.decay_steps or max(1, self.steps // 10)
            begin = max(self.warmup_steps, self.steps - length)
            end = self.steps
        else:
            begin, end = self.warmup_steps, self.decay_steps or self.steps
        if step <= begin:
            return 0.0
        return 1.0 if step >= end else (step - begin) / (end - begin)
