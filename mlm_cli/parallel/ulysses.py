"""Context parallelism by all-to-all (DeepSpeed-Ulysses: Jacobs et al. 2023, section 3).

A rank holds ``s / size`` consecutive tokens of every sample. Only attention needs the others: on the way in each rank
deals out its tokens by heads, and then holds all tokens of ``n / size`` heads; on the way out it takes them back.
A rank sends ``1 / size`` of what it holds to each other, so what each rank sends shrinks with the number of ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlm_cli.parallel.context import Group


def _deal_heads(x: Tensor, group: Group, blocks: tuple[int, ...]) -> Tensor:
    """``[b, s / size, sum(blocks), d]`` -> ``[b, s, sum(blocks) / size, d]``: of each block of heads an even share."""
    b, s, _, d = x.shape
    shares = [part.unflatten(2, (group.size, -1)) for part in x.split(blocks, 2)]
    dealt = torch.cat(shares, 3).permute(2, 0, 1, 3, 4)  # [size, b, s / size, heads, d]: for whom
    return group.all_to_all(dealt).transpose(0, 1).reshape(b, group.size * s, -1, d)  # from whom is which tokens


def _collect_heads(x: Tensor, group: Group, blocks: tuple[int, ...]) -> Tensor:
    """The way back: ``[b, s, sum(blocks) / size, d]`` -> ``[b, s / size, sum(blocks), d]``."""
    tokens = x.unflatten(1, (group.size, -1)).transpose(0, 1)  # [size, b, s / size, heads, d]
    heads = group.all_to_all(tokens).permute(1, 2, 0, 3, 4)  # [b, s / size, size, heads, d]
    shares = heads.split([block // group.size for block in blocks], 3)
    return torch.cat([share.flatten(2, 3) for share in shares], 2)


class _DealHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, blocks: tuple[int, ...]) -> Tensor:
        ctx.group, ctx.blocks = group, blocks
        return _deal_heads(x, group, blocks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _collect_heads(grad, ctx.group, ctx.blocks), None, None


class _CollectHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, blocks: tuple[int, ...]) -> Tensor:
        ctx.group, ctx.blocks = group, blocks
        return _collect_heads(x, group, blocks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _deal_heads(grad, ctx.group, ctx.blocks), None, None


class _SumOfShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.size = group.size
        return group.all_reduce_(x.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.size, None


def deal_heads(x: Tensor, group: Group, *blocks: int) -> Tensor:
    """Into attention: this rank's tokens of all heads ``[b, s / size, n, d]`` for all tokens of its heads.

    Args:
        blocks: heads of each kind (query, key, value), which together are ``n``; each a multiple of the group's size.

    Returns:
        ``[b, s, n / size, d]``, with the same order of kinds.
    """
    return x if group.size == 1 else _DealHeads.apply(x, group, blocks)


def collect_heads(x: Tensor, group: Group) -> Tensor:
    """Out of attention: all tokens of this rank's heads ``[b, s, n, d]`` for its tokens of all heads."""
    return x if group.size == 1 else _CollectHeads.apply(x, group, (x.shape[2] * group.size,))


def sum_of_shares(x: Tensor, group: Group) -> Tensor:
    """A loss over all tokens, from what each rank's own tokens give to it; the same on every rank.

    The gradient is multiplied by the size of the group: engines take the mean over all replicas, data and context ranks
    alike, and here the gradients of the ranks are parts that add up.
    """
    return x if group.size == 1 else _SumOfShares.apply(x, group)
