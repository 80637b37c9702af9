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
        """Rows for positions ``0..length`` at least, ``[positions, d]``; sines carry the sign of the rotation."""
        key = (device, dtype)
        if key not in self._made or self._made[key][0].shape[0] < length:
            rows = max(64, 1 << (length - 1).bit_length())
            exponents = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim
            angles = torch.outer(torch.arange(rows, device=device, dtype=torch.float32), self.base**-exponents)
            cos, sin = angles.cos().repeat(1, 2), torch.cat([-angles.sin(), angles.sin()], -1)
            self._made[key] = cos.to(dtype), sin.to(dtype)
        return self._made[key]

    def at(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Tables for ``positions [..., s]``: cos and signed sin, ``[..., s, 1, d]`` each."""
        cos, sin = self._table(int(positions.max()) + 1 if positions.numel() else 1, positions.device, dtype)
        return cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # The inverse of a rotation is the rotation by the opposite angle.
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate ``x [b, s, n, d]`` by the tables of ``RotaryTable.at``."""
    return _Rotate.apply(x, *tables)
