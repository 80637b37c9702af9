"""Matrices as int8 with a scale a row: symmetric, rounded to nearest, no calibration.

The weights' half of LLM.int8's vector-wise quantisation (Dettmers et al. 2022, section 3.1), and of ZeroQuant's by
groups (Yao et al. 2022, section 4.1) at one group a row. Activations are left as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127  # -128 is left out: codes are as far to one side as to the other
_ROWS = 1024  # rows that are float64 at a time


def quantize_rows(matrix: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """``matrix [out, in]`` -> codes int8 ``[out, in]``, scales ``[out]``.

    Every entry ``w`` is within half a scale of ``code * scale``. The scale of a row is its largest entry over 127 in
    ``dtype`` (unset: that of the matrix), and 1 where the row is zero: codes are chosen for the scale as it is stored.

    Raises:
        ValueError: the matrix holds a NaN or an infinity.
    """
    if not matrix.isfinite().all():
        raise ValueError("a NaN or an infinity has no code")
    largest = matrix.abs().amax(1).float()
    scales = _at_least(largest / LARGEST, largest / (LARGEST + 0.5), dtype or matrix.dtype)
    scales = torch.where(largest > 0, scales, torch.ones_like(scales))
    codes = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)
    for start in range(0, matrix.shape[0], _ROWS):
        part = slice(start, start + _ROWS)
        exact = matrix[part].double() / scales[part].double()[:, None]
        codes[part] = exact.round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    return codes, scales


def dequantize_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``code * scale`` in float32, then in ``dtype``. codes int8 ``[out, in]``, scales ``[out]`` -> ``[out, in]``."""
    # One type a pass: on the CPU a product of int8 and float32 takes a third longer than both passes.
    return codes.to(torch.float32).mul_(scales.float()[:, None]).to(dtype)


def _at_least(wanted: Tensor, least: Tensor, dtype: torch.dtype) -> Tensor:
    """``wanted`` (not negative) in ``dtype``; the next number where rounding, coarse near 0, fell below ``least``."""
    rounded = wanted.to(dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    above = (rounded.view(bits) + 1).view(dtype)  # numbers that are not negative are ordered as their bits are
    return torch.where(rounded.double() < least.double(), above, rounded)
