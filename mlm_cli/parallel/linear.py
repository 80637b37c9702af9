"""A linear layer whose backward overlaps communication, and orders its products for speed in bfloat16 on the CPU.

The all-reduce of the input's gradient runs while the weight's gradient is computed, as in Megatron-LM's
``LinearWithGradAccumulationAndAsyncCommunication``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlm_cli.ops import products
from mlm_cli.parallel.context import Group


def weight_gradient(grad: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """``grad^T x`` of ``grad [t, out]`` and ``x [t, in]``, giving ``[out, in]`` (in ``out`` if given).

    On the CPU in bfloat16 oneDNN gathers a transposed left factor element by element, which costs more than the
    product. Where one factor is much narrower than the other it pays to transpose that one first.
    """
    out_features, in_features = grad.shape[1], x.shape[1]
    if grad.is_cpu and grad.dtype == torch.bfloat16 and not products.widens(grad):
        if 2 * in_features <= out_features:
            turned = (x.t().contiguous() @ grad).t()
            return turned.contiguous() if out is None else out.copy_(turned)
        if 2 * out_features <= in_features:
            return torch.mm(grad.t().contiguous(), x, out=out)
    return products.mm(grad.t(), x, out=out)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.with_bias = group, bias is not None
        return products.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = products.mm(flat, weight).view(x.shape) if need_x else None
        pending = ctx.group.start_all_reduce_(grad_x) if grad_x is not None else None
        grad_weight = weight_gradient(flat, x.reshape(-1, x.shape[-1])) if need_weight else None
        grad_bias = flat.sum(0) if need_bias and ctx.with_bias else None
        if pending is not None:
            pending.wait()
        return grad_x, grad_weight, grad_bias, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
    """``x weight^T + bias``; the gradient of ``x [..., in]`` is summed over ``group`` (of size 1: nothing to sum)."""
    if torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias, group)
    return products.linear(x, weight, bias)
