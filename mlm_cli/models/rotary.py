"""Rotary positions (Su et al. 2021) in the half-split convention of transformers' Llama, so weights map one to one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RotaryTable:
    """Cosines and sines for every position, made on first use and kept.

    Args:
        dim: head size, even.
        base: wavelength base (theta).
    """

    def __init__(self, dim: int, base: float) -> None:
        self.dim, self.base = dim, base
        self._made: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def _table(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines for positions ``0..length`` at least, ``[positions, d / 2]``."""
        key = (device, dtype)
        if key not in self._made or self._made[key][0].shape[0] < length:
            rows = max(64, 1 << (length - 1).bit_length())
            exponents = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim
            angles = torch.outer(torch.arange(rows, device=device, dtype=torch.float32), self.base**-exponents)
            self._made[key] = angles.cos().to(dtype), angles.sin().to(dtype)
        return self._made[key]

    def at(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines for ``positions [..., s]``, ``[..., s, 1, d / 2]`` each."""
        cos, sin = self._table(int(positions.max()) + 1 if positions.numel() else 1, positions.device, dtype)
        return cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate_(x.clone(memory_format=torch.contiguous_format), cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # The inverse of a rotation is the rotation by the opposite angle.
        return rotate_(grad.clone(memory_format=torch.contiguous_format), cos, -sin), None, None


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x [b, s, n, d]`` in place; no autograd."""
    first, second = x.chunk(2, -1)
    turned = torch.addcmul(first * cos, second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(turned)
    return x


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate ``x [b, s, n, d]`` by the tables of ``RotaryTable.at``."""
    return _Rotate.apply(x, *tables)
