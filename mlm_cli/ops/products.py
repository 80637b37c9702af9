"""Matrix products in bfloat16 and float16 that are fast on processors without instructions for them, too.

torch has oneDNN multiply these types where the processor can (x86: bfloat16 from AVX-512 on, float16 on the newest
alone), and loops over single elements where it cannot: 4 to 50 times as long as in float32. AVX-512 without the
instructions for bfloat16 (Skylake to Ice Lake) is a case between: oneDNN emulates them, at a fifth of float32's rate.
On both the factors are widened to float32 and the product is rounded (docs/performance.md). Sums are kept in float32
in any case.

Each function is torch's of the same name, autograd included.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Terms of each sum that are widened at once: where they are a whole vocabulary, its logits and weights never all are.
_TERMS = 4096


def _ask() -> dict[torch.dtype, bool]:
    if not torch.backends.mkldnn.is_available():
        return {torch.bfloat16: False, torch.float16: False}
    return {
        torch.bfloat16: bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and not _emulates_bfloat16(),
        torch.float16: bool(torch.ops.mkldnn._is_mkldnn_fp16_supported()),
    }


def _emulates_bfloat16() -> bool:
    """Is this an x86 processor with AVX-512 whose bfloat16 products oneDNN puts together from other instructions?"""
    names = ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported")
    wide, *native = (bool(getattr(torch.cpu, name, bool)()) for name in names)
    return wide and not any(native)


_HAS_PRODUCTS = _ask()  # once: torch.compile cannot look into the questions


def has_products(dtype: torch.dtype) -> bool:
    """Does this processor have instructions for matrix products of bfloat16 or float16, and torch use them?"""
    return _HAS_PRODUCTS[dtype]


def widens(x: Tensor) -> bool:
    """Are products of this factor computed in float32?"""
    return x.is_cpu and x.dtype in (torch.bfloat16, torch.float16) and not has_products(x.dtype)


def widened(x: Tensor) -> Tensor:
    """Float32 where products are computed in it, for code that makes several of them in a row."""
    return x.float() if widens(x) else x


def mm(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    if not widens(left):
        return torch.mm(left, right, out=out)
    (a, *more_a), (b, *more_b) = left.split(_TERMS, 1), right.split(_TERMS, 0)
    product = torch.mm(a.float(), b.float())
    for a, b in zip(more_a, more_b, strict=True):
        product.addmm_(a.float(), b.float())
    return product.to(left.dtype) if out is None else out.copy_(product)


def addmm(bias: Tensor, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    if not widens(left):
        return torch.addmm(bias, left, right, out=out)
    return out.copy_(torch.addmm(bias.float(), left.float(), right.float()))


def bmm(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    if not widens(left):
        return torch.bmm(left, right, out=out)
    return _Bmm.apply(left, right) if out is None else out.copy_(torch.bmm(left.float(), right.float()))


class _Bmm(torch.autograd.Function):
    """Keeps the factors as they were given: weights of experts among them, which widened ones would be beside."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return torch.bmm(left.float(), right.float()).to(left.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        left, right = ctx.saved_tensors
        need_left, need_right = ctx.needs_input_grad
        return (
            bmm(grad, right.transpose(1, 2)) if need_left else None,
            bmm(left.transpose(1, 2), grad) if need_right else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # A few rows do not pay for widening a whole weight; with gradients there are more products to come than this one.
    if not widens(x) or (x.shape[:-1].numel() <= 3 and not torch.is_grad_enabled()):
        return F.linear(x, weight, bias)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
