"""Dynamic loss scaling (Micikevicius et al. 2018, section 3.2): float16 holds no gradient below 6e-8.

The loss is multiplied before the backward pass and the gradient divided before the update. A gradient that overflows
costs the step, not the run: nothing is applied, and after ``HYSTERESIS`` of them the scale is halved. ``window`` steps
in a row without one double it. The rule and its constants are those of Megatron-LM and of DeepSpeed's
``DynamicLossScaler``, so that a run may change engine between two starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

HYSTERESIS = 2
MIN_SCALE = 1.0
FACTOR = 2.0


class Scaler(Protocol):
    """What checkpoints and records need of a loss scale.

    Attributes:
        scale: that the next loss is multiplied with.
    """

    @property
    def scale(self) -> float: ...

    def state(self) -> dict[str, float]: ...

    def load(self, state: Mapping[str, float]) -> None: ...


@dataclass
class LossScale:
    """The scale of an engine of ours.

    Attributes:
        left: overflows until the scale is halved.
        steps: updates tried so far; ``last_overflow``: the last that overflowed.
    """

    scale: float
    window: int = 1000
    left: int = HYSTERESIS
    steps: int = 0
    last_overflow: int = -1

    def update(self, overflow: bool) -> bool:
        """After an update was tried; False: it overflows at the smallest scale, so scaling is not to blame."""
        hopeless = overflow and self.left == 1 and self.scale <= MIN_SCALE
        if overflow:
            if self.left == 1:
                self.scale = max(self.scale / FACTOR, MIN_SCALE)
            else:
                self.left -= 1
            self.last_overflow = self.steps
        else:
            calm = self.steps - self.last_overflow - 1
            if calm > 0 and calm % self.window == 0:
                self.left = HYSTERESIS
                self.scale *= FACTOR
        self.steps += 1
        return not hopeless

    def state(self) -> dict[str, float]:
        """Plain values, without ``window``, which is the recipe's."""
        values = asdict(self)
        del values["window"]
        return values

    def load(self, state: Mapping[str, float]) -> None:
        self.scale, self.left = float(state["scale"]), int(state["left"])
        self.steps, self.last_overflow = int(state["steps"]), int(state["last_overflow"])


_DEEPSPEED = {
    "scale": "cur_scale",
    "left": "cur_hysteresis",
    "steps": "cur_iter",
    "last_overflow": "last_overflow_iter",
}


class DeepSpeedScale:
    """The same of a DeepSpeed optimizer, whose own scaler decides."""

    def __init__(self, scaler: Any, scale: float) -> None:
        self._scaler = scaler
        scaler.cur_scale = scale
        scaler.raise_error_at_min_scale = False  # the step is judged by the recipe's policy instead

    @property
    def scale(self) -> float:
        return float(self._scaler.cur_scale)

    @property
    def hopeless(self) -> bool:
        """Would another overflow find the scale at its smallest?"""
        return self._scaler.cur_hysteresis == 1 and self.scale <= MIN_SCALE

    def state(self) -> dict[str, float]:
        return {ours: getattr(self._scaler, theirs) for ours, theirs in _DEEPSPEED.items()}

    def load(self, state: Mapping[str, float]) -> None:
        for ours, theirs in _DEEPSPEED.items():
            setattr(self._scaler, theirs, float(state[ours]) if ours == "scale" else int(state[ours]))
