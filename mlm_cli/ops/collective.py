"""Sums and gathers over processes of one machine through memory they share; kernels only, gloo is the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from mlm_cli.ops import registry


def serves_shared_memory() -> bool:
    """True where the functions below have a kernel: beside compiled CPU kernels."""
    return registry.cpu_loaded


def shared_all_reduce_(x: Tensor, segment: Tensor, rank: int, size: int, timeout: float) -> None:
    """Sum ``x`` over the group in place, parts added in rank order in float32: the same bits on every rank.

    Args:
        x: contiguous CPU tensor, of the same shape and dtype on every rank.
        segment: uint8 over memory that all ranks of the group map; zeroed before its first use.
        timeout: seconds after which a rank that does not come raises RuntimeError.
    """
    torch.ops.mlm.shared_all_reduce_.default(x, segment, rank, size, timeout)


def shared_all_gather_(out: Tensor, x: Tensor, segment: Tensor, rank: int, size: int, timeout: float) -> None:
    """Fill ``out`` with the ``x`` of all ranks, in rank order.

    Args:
        out: contiguous CPU tensor of ``size`` times the elements of ``x``, of its dtype.
        x: contiguous, of the same shape and dtype on every rank; may be this rank's part of ``out``.
        segment, rank, size, timeout: as for ``shared_all_reduce_``.
    """
    torch.ops.mlm.shared_all_gather_.default(out, x, segment, rank, size, timeout)
