"""Sequence parallelism (Korthikanti et al. 2022, section 4.2.2): between sliced layers a rank holds part of the tokens.

Norms, dropout and residuals then work on ``[b, s / size, h]``. An all-reduce becomes an all-gather on the way into a
sliced region and a reduce-scatter on the way out: the same traffic, less to keep. A group of size 1 changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlm_cli.ops import products
from mlm_cli.parallel.context import Group
from mlm_cli.parallel.linear import weight_gradient

_DIM = 1  # of tokens in [b, s, ...]


def own_tokens(x: Tensor, group: Group, dim: int = _DIM) -> Tensor:
    """This rank's part of the tokens along ``dim`` (a view); no gradient goes to the others."""
    return x if group.size == 1 else x.chunk(group.size, dim)[group.rank]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return torch.cat(group.all_gather(x), _DIM)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return own_tokens(grad, ctx.group).contiguous(), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.reduce_scatter(x, _DIM)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.cat(ctx.group.all_gather(grad), _DIM), None


class _GatheredLinear(torch.autograd.Function):
    """Keeps this rank's tokens alone; the others' are gathered again in the backward pass, beside a product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.with_bias = group, bias is not None
        return products.linear(torch.cat(group.all_gather(x), _DIM), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        parts, pending = ctx.group.start_all_gather(x)
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = ctx.group.reduce_scatter(products.mm(flat, weight).view(*grad.shape[:-1], -1), _DIM)
        if pending is not None:
            pending.wait()
        gathered = torch.cat(parts, _DIM)
        grad_weight = weight_gradient(flat, gathered.view(-1, gathered.shape[-1]))
        return grad_x, grad_weight, flat.sum(0) if ctx.with_bias else None, None


def gather_tokens(x: Tensor, group: Group) -> Tensor:
    """``[b, s / size, h]`` -> ``[b, s, h]``; the gradient must be the same on all ranks: each keeps its part."""
    return x if group.size == 1 else _Gather.apply(x, group)


def reduce_scatter_tokens(x: Tensor, group: Group) -> Tensor:
    """Sum ``x [b, s, h]`` over the group, keep this rank's tokens (``x`` may be overwritten); backward gathers."""
    return x if group.size == 1 else _ReduceScatter.apply(x, group)


def gathered_linear(x: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
    """``x weight^T + bias`` of the tokens of all ranks, ``[b, s / size, in]`` -> ``[b, s, out]``.

    The gradient of ``x`` is summed over the group, which ``weight`` is cut over too.
    """
    return _GatheredLinear.apply(x, weight, bias, group)
