"""Sparse attention through torch's FlexAttention, which makes one GPU kernel of a pattern and trains with it.

Used on a GPU for whole passes. Its block mask comes from ``SparsePattern.block_mask``, never from a mask of all pairs,
so that memory stays linear. The kernel is compiled (Triton) when a shape is first met.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlm_cli.ops.sparse_pattern import SparsePattern, random_table

_BLOCK = 128  # tokens of a block of FlexAttention's own mask: what its kernels take at a time
_LEAST_HEAD = 16  # smallest product of the matrix units


def serves_flex(query: Tensor, visible: Tensor | None) -> bool:
    """True where FlexAttention computes this: on a GPU with Triton, and hiding no more than padding besides."""
    if not query.is_cuda or query.shape[-1] < _LEAST_HEAD or query.dtype == torch.float64:
        return False
    return (visible is None or visible.shape[2] == 1) and _has_triton()


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    from torch.utils._triton import has_triton

    return bool(has_triton())


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: SparsePattern,
    *,
    causal: bool,
    visible: Tensor | None = None,
    segments: Tensor | None = None,
    scale: float | None = None,
    attend: Callable[..., Any] | None = None,
) -> Tensor:
    """``sparse_attention`` of a whole sequence to itself; ``visible``: ``[b or 1, 1, 1, keys]``.

    Args:
        attend: what to call in the place of the compiled ``flex_attention`` (tests: the uncompiled one).
    """
    mask = _recent_block_mask(pattern, query.shape[2], causal, query.device, visible, segments)
    attend = attend or _compiled()
    grouped = query.shape[1] != key.shape[1]
    out: Tensor = attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped)
    return out


# The mask made last, with what it was made from: all layers of a pass ask for the same one, and making it takes dozens
# of small kernels. Tensors are compared by identity and version, and held, so that neither can be another's.
_recent: tuple[Any, Any] | None = None


def _recent_block_mask(
    pattern: SparsePattern, length: int, causal: bool, device: torch.device, *masks: Tensor | None
) -> Any:
    global _recent
    # tensors of inference mode count no versions; a pass does not change its masks
    versions = (0 if m is None or m.is_inference() else m._version for m in masks)
    key = (pattern, length, causal, device, *versions)
    if _recent is not None:
        (known, held), mask = _recent
        if known == key and all(a is b for a, b in zip(held, masks, strict=True)):
            return mask
    with torch.inference_mode(False):  # kept, it may serve a pass that is differentiated
        mask = flex_block_mask(pattern, length, causal, device, *masks)
    _recent = ((key, masks), mask)
    return mask


def flex_block_mask(
    pattern: SparsePattern,
    length: int,
    causal: bool,
    device: torch.device,
    visible: Tensor | None = None,
    segments: Tensor | None = None,
) -> Any:
    """The ``BlockMask`` of a sequence of ``length`` tokens: blocks by the pattern alone, pairs by every mask."""
    from torch.nn.attention.flex_attention import BlockMask

    table = random_table(pattern, length, causal, device) if pattern.kind == "bigbird" else None
    shown = None if visible is None else visible[:, 0, 0]

    def seen(b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        pair = pattern.visible(query, key, causal=causal, table=table)
        if segments is not None:
            pair = pair & (segments[b, query] == segments[b, key])
        if shown is not None:
            pair = pair & (shown[b, key] if shown.shape[0] > 1 else shown[0, key])
        return pair

    counts, indices = _flex_blocks(pattern, length, causal, device)
    return BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=_BLOCK, mask_mod=seen, seq_lengths=(length, length))


@lru_cache(maxsize=16)
def _flex_blocks(pattern: SparsePattern, length: int, causal: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many key blocks each block of queries has, ``[1, 1, blocks]``; which, first in ``[1, 1, blocks, blocks]``."""
    fine = -(-length // pattern.block)
    mask = pattern.block_mask(fine, fine, causal=causal)
    blocks = -(-length // _BLOCK)
    # Two blocks of FlexAttention meet where any of the pattern's blocks that touch them do.
    first = np.arange(blocks) * _BLOCK // pattern.block
    last = np.minimum((np.arange(blocks) + 1) * _BLOCK - 1, length - 1) // pattern.block
    summed = np.zeros((fine + 1, fine + 1), dtype=np.int64)
    summed[1:, 1:] = mask.cumsum(0).cumsum(1)
    low, high = first, last + 1
    inside = (
        summed[np.ix_(high, high)] - summed[np.ix_(low, high)] - summed[np.ix_(high, low)] + summed[np.ix_(low, low)]
    )
    coarse = torch.from_numpy(inside > 0)
    counts = coarse.sum(-1, dtype=torch.int32)
    indices = torch.argsort((~coarse).to(torch.int8), dim=-1, stable=True).to(torch.int32)
    return counts[None, None].to(device), indices[None, None].to(device)
