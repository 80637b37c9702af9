"""Sparse self-attention of a model: which path computes a pass, and the pattern as a mask for the other paths."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mlm_cli import ops
from mlm_cli.config.schema import ModelSection
from mlm_cli.config.shapes import is_sparse
from mlm_cli.models.info import SequenceInfo


def pattern_of(model: ModelSection) -> ops.SparsePattern | None:
    """The pattern that a model's queries see their keys by; None where they see all."""
    if not is_sparse(model):
        return None
    asked = model.attention
    return ops.SparsePattern(
        kind=asked.pattern or "",
        block=asked.block,
        window=asked.window,
        global_tokens=asked.global_tokens,
        random=asked.random,
        length=model.seq_length,
        seed=asked.seed,
    )


def attend_sparse(
    query: Tensor, key: Tensor, value: Tensor, info: SequenceInfo, pattern: ops.SparsePattern, *, cached: bool
) -> Tensor | None:
    """Attention of ``query [b, n, s, d]`` to ``key, value [b, groups, keys, d]`` at the cost of the pattern.

    Returns:
        ``[b, n, s, d]``; None where the few queries of a cached step are better served by a mask: see ``masked``.
    """
    if cached and (query.shape[2] == 1 or info.start is not None):
        return None
    visible = None if cached else info.visible  # with a cache and no padding it says no more than `causal`
    options = {"causal": info.causal, "visible": visible, "segments": info.segments}
    if not cached and ops.serves_flex(query, visible):
        return ops.flex_sparse_attention(query, key, value, pattern, **options)
    return ops.sparse_attention(query, key, value, pattern, offset=info.offset, **options)


def masked(
    query: Tensor, key: Tensor, value: Tensor, info: SequenceInfo, pattern: ops.SparsePattern, *, cached: bool
) -> tuple[Tensor, Tensor, SequenceInfo]:
    """The pattern laid over what ``info`` shows, for attention that takes any mask: (key, value, info).

    Keys that have gone out of the window of all queries are left out, so that a step of decoding with a local pattern
    costs the same however long the text is.
    """
    length, device = query.shape[2], query.device
    at_key = torch.arange(key.shape[2], device=device)
    at_query = torch.arange(info.offset, info.offset + length, device=device)
    if info.start is not None:  # rows padded on the left: the first token of each is at position 0
        at_key, at_query = at_key - info.start[:, None], at_query - info.start[:, None]
    elif cached:
        at_query = info.positions  # rows of a decoder, each as long as its text is
    gone = 0
    if cached and info.start is None and pattern.kind == "local" and at_query.is_cpu:
        gone = max(0, int(at_query.min()) - pattern.window + 1)
        key, value, at_key = key[:, :, gone:], value[:, :, gone:], at_key[gone:]
    seen = pattern.visible(at_query[..., :, None], at_key[..., None, :], causal=info.causal)
    visible = seen[None, None] if seen.dim() == 2 else seen[:, None]
    if info.segments is not None:
        visible = visible & (info.segments[:, None, :, None] == info.segments[:, None, None, :])
    if info.visible is not None:
        visible = visible & info.visible[..., gone:]
    return key, value, replace(info, visible=visible, runs=None)
