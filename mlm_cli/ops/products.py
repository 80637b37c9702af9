"""Matrix products in bfloat16 and float16 that are fast on processors without instructions for them, too.

torch has oneDNN multiply these types where the processor can (x86: from AVX-512 on for bfloat16, the newest alone for
float16), and loops over single elements where it cannot: 4 to 50 times as long as in float32 (docs/performance.md).
There the factors are widened to float32 and the product is rounded. Both ways sums are kept in float32.

Each function is torch's of the same name, autograd included.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


@cache
def has_products(dtype: torch.dtype) -> bool:
    """Does this processor multiply matrices of bfloat16 or float16 faster than element by element?"""
    if not torch.backends.mkldnn.is_available():
        return False
    ask = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return bool(ask[dtype]())


def widens(x: Tensor) -> bool:
    """Are products of this factor computed in float32?"""
    return x.is_cpu and x.dtype in (torch.bfloat16, torch.float16) and not has_products(x.dtype)


def widened(x: Tensor) -> Tensor:
    """Float32 where products are computed in it, for code that makes several of them in a row."""
    return x.float() if widens(x) else x


def mm(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    if not widens(left):
        return torch.mm(left, right, out=out)
    product = torch.mm(left.float(), right.float())
    return product.to(left.dtype) if out is None else out.copy_(product)


def addmm(bias: Tensor, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    if not widens(left):
        return torch.addmm(bias, left, right, out=out)
    return out.copy_(torch.addmm(bias.float(), left.float(), right.float()))


def bmm(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    if not widens(left):
        return torch.bmm(left, right, out=out)
    product = torch.bmm(left.float(), right.float())
    return product.to(left.dtype) if out is None else out.copy_(product)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # A single row is a product of matrix and vector, which torch has loops for that pay.
    if not widens(x) or x.shape[:-1].numel() == 1:
        return F.linear(x, weight, bias)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
