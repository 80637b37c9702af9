"""Relative positions of T5: a learned bias on attention scores for each head and distance.

Raffel et al. 2020 (https://arxiv.org/abs/1910.10683), section 2.1; buckets as in mesh-tensorflow's
``transformer/transformer_layers.py``: half of them for single distances, the other half for distances that grow
logarithmically up to ``max_distance``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlm_cli.config.initial_std import initial_std
from mlm_cli.config.schema import ModelSection
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.layers import new_parameter
from mlm_cli.parallel.shard import Shard


def buckets_of(distance: Tensor, num_buckets: int, max_distance: int, *, both_ways: bool) -> Tensor:
    """The bucket of each distance ``key - query``, int64 of the same shape.

    Args:
        both_ways: half of the buckets are for keys that come later; else these share bucket 0 with the query itself.
    """
    first = torch.zeros_like(distance)
    if both_ways:
        num_buckets //= 2
        first = (distance > 0).long() * num_buckets
        distance = distance.abs()
    else:
        distance = -distance.clamp(max=0)
    exact = num_buckets // 2
    # In float32, as in the published models: on the border of two buckets rounding decides.
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = exact + (growth * (num_buckets - exact)).long()
    return first + torch.where(distance < exact, distance, far.clamp(max=num_buckets - 1))


class _Spread(torch.autograd.Function):
    """``values [n, queries + keys - 1]``, one a distance, to ``[n, queries, keys]``."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, keys: int) -> Tensor:
        # Row i of the result begins `queries - 1 - i` places into the values.
        return values.unfold(1, keys, 1).flip(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        n, queries, keys = grad.shape
        # Rows of one place more than the result shift by one place a row when they are read without it.
        padded = F.pad(grad.flip(1), (0, queries)).flatten(1)
        width = queries + keys - 1
        return padded[:, : queries * width].view(n, queries, width).sum(1), None


class RelativeBias(nn.Module):
    """The table of one stack, which all of its layers share; cut over the tensor group by heads.

    Args:
        both_ways: the encoder's, whose tokens see later ones too.
    """

    def __init__(self, model: ModelSection, parallel: ParallelContext, dtype: torch.dtype, *, both_ways: bool) -> None:
        super().__init__()
        self.num_buckets, self.max_distance = model.relative_buckets, model.relative_max_distance
        self.both_ways = both_ways
        heads = model.num_attention_heads // parallel.tensor.size
        std, device = initial_std(model).relative, parallel.device
        self.weight = new_parameter(self.num_buckets, heads, init=std, shard=Shard(1), dtype=dtype, device=device)

    def forward(self, queries: int, keys: int) -> Tensor:
        """Biases of a pass over a whole sequence: float32 ``[1, n, queries, keys]``; -inf for keys out of sight."""
        distance = torch.arange(1 - queries, keys, device=self.weight.device)
        values = self._values(distance).t().contiguous()
        if not self.both_ways:
            values = values.masked_fill(distance > 0, -math.inf)
        return _Spread.apply(values, keys)[None]

    def at(self, positions: Tensor, keys: int) -> Tensor:
        """Biases of one query a row, at ``positions [b]``: float32 ``[b, n, 1, keys]``, -inf as in ``forward``."""
        distance = torch.arange(keys, device=positions.device) - positions[:, None]
        values = self._values(distance)
        if not self.both_ways:
            values = values.masked_fill((distance > 0)[..., None], -math.inf)
        return values.transpose(1, 2)[:, :, None]

    def _values(self, distance: Tensor) -> Tensor:
        """``[...]`` -> float32 ``[..., n]``."""
        buckets = buckets_of(distance, self.num_buckets, self.max_distance, both_ways=self.both_ways)
        return F.embedding(buckets, self.weight).float()
