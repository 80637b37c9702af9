"""Losses that layers have of their own, minimised beside the model's: no stage of a pipeline has to carry their sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _WithLoss(torch.autograd.Function):
    """``x``, whose backward pass also minimises ``weight * loss``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, grad.new_tensor(ctx.weight, dtype=torch.float32), None


class ExtraLoss(nn.Module):
    """A layer with a loss of its own.

    Attributes:
        loss_scale: gradient that the loss of a micro-batch begins its backward pass with (engines that average
            micro-batches or scale losses set it, see ``scale_losses``).
    """

    def __init__(self) -> None:
        super().__init__()
        self.loss_scale = 1.0

    def minimise(self, loss: Tensor, x: Tensor, weight: float = 1.0) -> Tensor:
        """``x``, with which the float32 scalar ``loss`` goes backward, ``weight`` times."""
        return _WithLoss.apply(x, loss, weight * self.loss_scale)


def scale_losses(model: nn.Module, scale: float) -> None:
    """Tell all such layers with which gradient the loss of a micro-batch begins its backward pass."""
    for module in model.modules():
        if isinstance(module, ExtraLoss):
            module.loss_scale = scale
