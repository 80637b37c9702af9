"""Communication of sliced layers as autograd functions (Shoeybi et al. 2019, section 3: the operators f and g).

Each returns its input untouched for a group of size 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlm_cli.parallel.context import Group


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Several consumers may share this gradient: reduce a copy.
        return ctx.group.all_reduce_(grad.clone(memory_format=torch.contiguous_format)), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.mark_dirty(x)
        return group.all_reduce_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return torch.cat(group.all_gather(x), -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.group.size, -1)[ctx.group.rank].contiguous(), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.chunk(group.size, -1)[group.rank].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.cat(ctx.group.all_gather(grad), -1), None


def copy_to_group(x: Tensor, group: Group) -> Tensor:
    """Into a sliced region (f): identity forward, all-reduce of the gradient backward."""
    return x if group.size == 1 else _Copy.apply(x, group)


def reduce_from_group(x: Tensor, group: Group) -> Tensor:
    """Out of a sliced region (g): all-reduce forward (in place: ``x`` must be a fresh result), identity backward."""
    return x if group.size == 1 else _Reduce.apply(x, group)


def gather_from_group(x: Tensor, group: Group) -> Tensor:
    """Concatenate the last dimension over the group; backward keeps this rank's part of the gradient."""
    return x if group.size == 1 else _Gather.apply(x, group)


def scatter_to_group(x: Tensor, group: Group) -> Tensor:
    """Keep this rank's part of the last dimension; backward concatenates the gradients."""
    return x if group.size == 1 else _Scatter.apply(x, group)
