"""How a parameter is cut over the tensor group, written on the parameter itself as ``param.shard``.

One description serves everything that must know: initial weights, checkpoints in any layout, exports.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlm_cli.parallel.context import Group


@dataclass(frozen=True)
class Shard:
    """Cut along ``dim``.

    Attributes:
        dim: the dimension that is sliced.
        blocks: full sizes of the parts of ``dim`` that are sliced separately (query | key | value, gate | up), so that
            a rank's slice holds its share of each part. None: one part.
        valid: meaningful entries along ``dim``; the rest is padding (vocabulary rows). None: all.
    """

    dim: int
    blocks: tuple[int, ...] | None = None
    valid: int | None = None

    def ranges(self, full_size: int, rank: int, size: int) -> list[tuple[int, int]]:
        """The ranges ``[start, stop)`` along ``dim`` of the full tensor that make up the slice of ``rank``."""
        ranges, offset = [], 0
        for block in self.blocks or (full_size,):
            assert block % size == 0, f"{block} entries cannot be sliced over {size} ranks"
            step = block // size
            ranges.append((offset + rank * step, offset + (rank + 1) * step))
            offset += block
        assert offset == full_size, f"blocks {self.blocks} do not sum to {full_size}"
        return ranges


def shard_of(param: Tensor) -> Shard | None:
    """The shard of a parameter; None when every tensor rank holds all of it."""
    return getattr(param, "shard", None)


def full_shape(local: Tensor, size: int) -> tuple[int, ...]:
    """Shape of the whole parameter of which ``local`` is the slice, in a tensor group of ``size``."""
    shard, shape = shard_of(local), list(local.shape)
    if shard is not None:
        shape[shard.dim] *= size
    return tuple(shape)


def slice_full(full: Tensor, shard: Shard | None, rank: int, size: int) -> Tensor:
    """The slice of ``full`` that ``rank`` of ``size`` holds (a view where one range is enough)."""
    if shard is None or size == 1:
        return full
    parts = [full.narrow(shard.dim, a, b - a) for a, b in shard.ranges(full.shape[shard.dim], rank, size)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, shard.dim)


def assemble(parts: list[Tensor], shard: Shard | None) -> Tensor:
    """The inverse of ``slice_full``: the full tensor from the slices of all ranks, in rank order."""
    if shard is None or len(parts) == 1:
        return parts[0]
    if shard.blocks is None:
        return torch.cat(parts, shard.dim)
    sizes = [block // len(parts) for block in shard.blocks]
    pieces = [part.split(sizes, shard.dim) for part in parts]
    return torch.cat([piece[i] for i in range(len(sizes)) for piece in pieces], shard.dim)


def gather_full(local: Tensor, shard: Shard | None, group: Group) -> Tensor:
    """The full tensor, on every rank of ``group``; padding included."""
    if shard is None or group.size == 1:
        return local
    return assemble(group.all_gather(local.detach()), shard)
