"""Autograd for the compiled operators, twice: registered with torch for ``torch.compile`` and direct calls, and as a
plain ``autograd.Function``, which costs a small model several microseconds less per call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd as below_autograd
from torch.autograd.function import once_differentiable

Call = Callable[..., Any]


def differentiable(op: Any, num_results: int, setup: Call, backward: Call) -> Call:
    """A function of ``op``'s arguments that returns its first ``num_results`` results with gradients.

    Args:
        op: an overload, as ``torch.ops.mlm.swiglu.default``.
        num_results: how many results are meant for the caller; the rest are kept for the backward pass.
        setup: ``setup(ctx, inputs, output)`` as in ``torch.library.register_autograd``.
        backward: ``backward(ctx, *grads)``; gets at least ``num_results`` gradients, None for an unused result.
    """

    def pick(output: Any) -> Any:
        if isinstance(output, Tensor):
            return output
        return output[0] if num_results == 1 else tuple(output[:num_results])

    def setup_lean(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        setup(ctx, inputs, output)

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with below_autograd():
                output = op(*inputs)
            setup_lean(ctx, inputs, output)
            return pick(output)

        @staticmethod
        @once_differentiable  # type: ignore[untyped-decorator]
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

    torch.library.register_autograd(op, backward, setup_context=setup_lean)
    apply = Fused.apply

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return pick(op(*inputs))
        if torch.is_grad_enabled():
            for value in inputs:
                if isinstance(value, Tensor) and value.requires_grad:
                    return apply(*inputs)
        with below_autograd():
            return pick(op(*inputs))

    return call


def dropout_seed(x: Tensor, dropout: float) -> Tensor | None:
    """One int64 from torch's generator of ``x``'s device, so that ``manual_seed`` and RNG checkpoints hold; no sync."""
    if dropout == 0.0:
        return None
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=x.device)
