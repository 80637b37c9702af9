"""Rotary positions (Su et al. 2021) in the half-split convention of transformers' Llama, so weights map one to one.

Scaled for contexts longer than the trained one: linear (Chen et al. 2023, "Extending Context Window of Large Language
Models via Positional Interpolation"), by a longer base ("NTK-aware", described in Peng et al. 2023, section 3.1; fixed,
or dynamic by the length of each text, section 3.3), YaRN (Peng et al. 2023, "YaRN", sections 3.2 and 3.4) and the form
of Llama 3.1 (Grattafiori et al. 2024, "The Llama 3 Herd of Models", and the code released with it).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mlm_cli.config.schema import ModelSection, RotaryScalingSection
from mlm_cli.config.shapes import head_dim


class RotaryTable:
    """Cosines and sines for every position, made on first use and kept.

    Args:
        dim: head size, even.
        base: wavelength base (theta).
        scaling: for a longer context than the trained one.
    """

    def __init__(self, dim: int, base: float, scaling: RotaryScalingSection | None = None) -> None:
        self.dim, self.base, self.scaling = dim, base, scaling
        self._made: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    @staticmethod
    def of(model: ModelSection) -> RotaryTable | None:
        """The table of a model, or None where its positions are not rotary."""
        if model.position != "rotary":
            return None
        return RotaryTable(head_dim(model), model.rotary_base, model.rotary_scaling)

    def _table(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines for positions ``0..length`` at least, ``[positions, d / 2]``."""
        key = (device, dtype)
        if key not in self._made or self._made[key][0].shape[0] < length:
            rows = max(64, 1 << (length - 1).bit_length())
            frequencies = rotary_frequencies(self.dim, self.base, self.scaling, device)
            angles = torch.outer(torch.arange(rows, device=device, dtype=torch.float32), frequencies)
            self._made[key] = self._turns(angles, dtype)
        return self._made[key]

    def _turns(self, angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        factor = attention_factor(self.scaling)
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)

    def at(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines for ``positions [..., s]``, ``[..., s, 1, d / 2]`` each."""
        if self.scaling is not None and self.scaling.type == "dynamic":
            return self._dynamic(positions, dtype)
        cos, sin = self._table(int(positions.max()) + 1 if positions.numel() else 1, positions.device, dtype)
        return cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2)

    def _dynamic(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Each row of positions by frequencies of its own length; transformers takes the longest of a batch for all."""
        length = positions.amax(-1, keepdim=True).unsqueeze(-1).float() + 1
        angles = positions.unsqueeze(-1).float() * _dynamic_frequencies(self.dim, self.base, self.scaling, length)
        cos, sin = self._turns(angles, dtype)
        return cos.unsqueeze(-2), sin.unsqueeze(-2)


def _exponents(dim: int, device: torch.device | None) -> Tensor:
    return torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim


def rotary_frequencies(
    dim: int, base: float, scaling: RotaryScalingSection | None = None, device: torch.device | None = None
) -> Tensor:
    """Radians a position for each pair of a head, float32 ``[d / 2]``. ``dynamic``: those of the trained length."""
    plain = base ** -_exponents(dim, device)
    if scaling is None or scaling.type == "dynamic":
        return plain
    if scaling.type == "linear":
        return plain / scaling.factor
    if scaling.type == "ntk":
        return ntk_base(dim, base, scaling.factor) ** -_exponents(dim, device)
    if scaling.type == "llama3":  # the ramp is over turns, where YaRN's is over pairs
        turns = plain * (scaling.original_seq_length / (2 * math.pi))
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp_(0, 1)
        return plain / scaling.factor * (1 - kept) + plain * kept
    # YaRN: pairs that turn often within the trained context stay, those that hardly turn are stretched, a ramp between.
    fast, slow = (_pair_of(turns, dim, base, scaling) for turns in (scaling.beta_fast, scaling.beta_slow))
    first, last = max(math.floor(fast), 0), min(math.ceil(slow), dim - 1)
    pairs = torch.arange(dim // 2, device=device, dtype=torch.float32)
    stretched = ((pairs - first) / ((last - first) or 0.001)).clamp_(0, 1)
    return plain / scaling.factor * stretched + plain * (1 - stretched)


def _pair_of(turns: float, dim: int, base: float, scaling: RotaryScalingSection) -> float:
    """Which pair makes so many turns within the trained context (Peng et al. 2023, section 3.2; a fraction)."""
    return dim * math.log(scaling.original_seq_length / (turns * 2 * math.pi)) / (2 * math.log(base))


def ntk_base(dim: int, base: float, stretch: float) -> float:
    """The base with which the slowest pair turns ``stretch`` times as slowly and the fastest as before."""
    return base * stretch ** (dim / (dim - 2)) if dim > 2 else base


def _dynamic_frequencies(dim: int, base: float, scaling: RotaryScalingSection | None, length: Tensor) -> Tensor:
    """Frequencies for texts of ``length [..., 1]`` tokens, ``[..., d / 2]``, in transformers' form of "dynamic NTK"."""
    assert scaling is not None
    trained, factor = scaling.original_seq_length, scaling.factor
    stretch = factor * length.clamp(min=trained) / trained - (factor - 1)
    longer = base * stretch ** (dim / (dim - 2)) if dim > 2 else torch.full_like(stretch, base)
    return longer ** -_exponents(dim, length.device)


def attention_factor(scaling: RotaryScalingSection | None) -> float:
    """What YaRN multiplies queries and keys with, instead of a temperature on their scores (section 3.4)."""
    if scaling is None or scaling.type != "yarn":
        return 1.0
    return scaling.attention_factor or (0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate_(x.clone(memory_format=torch.contiguous_format), cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # The transpose of a rotation, scaled or not, is the rotation by the opposite angle.
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
