"""What the loop needs of an engine.

An engine holds the model, its float32 master weights and AdamW's moments. One update is ``accumulate`` (forward and
backward of every micro-batch) and ``step``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from mlm_cli.checkpoint.state import Fragment
from mlm_cli.training.loss_scale import Scaler

Batch = dict[str, Tensor]
# objective(model, batch) -> (mean loss of the micro-batch with gradient, sums such as {"tokens": ...}; no gradient)
Objective = Callable[[Any, Batch], tuple[Tensor, Mapping[str, Any]]]


@dataclass(frozen=True)
class Outcome:
    """What one micro-batch gave: its loss (float32 scalar, detached) and the objective's sums."""

    loss: Tensor
    sums: Mapping[str, Any]


_USUAL_STD = 0.02  # of initial weights, in GPT and BERT


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (Loshchilov & Hutter 2019). Weight decay skips parameters of one dimension: biases and norms."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_grad: float = 1.0  # largest global gradient norm; 0: no clipping
    loss_scale: float = 65536.0  # float16 alone: what it begins with
    loss_scale_window: int = 1000  # float16 alone: calm steps after which it is doubled
    lr_scaling: Literal["none", "initial_std"] = "none"

    def of(self, parameter: Tensor) -> ParameterSettings:
        """What AdamW is told about one parameter.

        With ``lr_scaling`` ``initial_std`` it takes the steps that it would take if all weights had been drawn with
        GPT's deviation of 0.02 and multiplied by a constant afterwards: those drawn wider move further. Adafactor does
        the same with the size they have at each step (Shazeer and Stern 2018, section 8). Where parts of a parameter
        are drawn differently (queries beside keys) the narrowest counts; what starts from zeros or ones is not scaled.
        """
        decay = self.weight_decay if parameter.dim() > 1 else 0.0
        scale, init = 1.0, getattr(parameter, "init", None)
        if self.lr_scaling == "initial_std" and isinstance(init, float | tuple):
            scale = (min(init) if isinstance(init, tuple) else init) / _USUAL_STD
        return ParameterSettings(lr_scale=scale, weight_decay=decay / scale, eps=self.eps / scale)


@dataclass(frozen=True)
class ParameterSettings:
    """Of one parameter: what the learning rate is multiplied with, and AdamW's own settings."""

    lr_scale: float
    weight_decay: float
    eps: float


class Engine(Protocol):
    """An optimizer around a model. All ranks call every method together.

    Attributes:
        model: the module, for evaluation; its weights are those of the last update.
        updates: optimizer updates taken (Adam's step count).
        scaler: of the loss, in float16; else None.
        overflowed: the last ``step`` was not taken because the scaled gradient overflowed: no fault of the batch.
    """

    name: str
    model: nn.Module
    updates: int
    scaler: Scaler | None
    overflowed: bool

    def accumulate(self, objective: Objective, batches: Sequence[Batch]) -> list[Outcome]:
        """Forward and backward of the micro-batches of one update; gradients are averaged over them."""

    def step(self, lr: float) -> float:
        """Clip and apply the gradients, and forget them; returns the global gradient norm before clipping.

        When the norm is not finite nothing is applied to any weight.
        """

    def discard(self) -> None:
        """Forget the gradients in place of a ``step``: weights, moments and ``updates`` stay as they are."""

    def fragments(self) -> Sequence[Fragment]:
        """The optimizer state this rank owns, as live tensors."""

    def refresh(self) -> None:
        """After writing to ``fragments()``: bring the model's weights in line with the masters."""

    def fp32_weights(self) -> AbstractContextManager[None]:
        """While it is open the model's parameters are the float32 masters; for writing ``model/``."""
