"""Attention in which every query sees one run of keys: causal or not, in a window, a document, before padding."""

from __future__ import annotations

import torch
from torch import Tensor

from mlm_cli.ops import reference, registry
from mlm_cli.ops.sparse_pattern import SparsePattern

if registry.cpu_loaded:
    from mlm_cli.ops import kernels

# Fewer queries do not pay for packing the keys that they see.
FEWEST_QUERIES = 64
_MIN_HEADS = 4
_LONGEST_RUN = 4096

Runs = tuple[Tensor, Tensor]  # the first key that a query sees, and one after the last: int64 [1 or b, s] each


def interval_attention(query: Tensor, key: Tensor, value: Tensor, begin: Tensor, end: Tensor, scale: float) -> Tensor:
    """``softmax(query key^T * scale) value`` over keys ``begin[i] <= j < end[i]`` for query ``i``.

    Args:
        query: ``[b, n, s, d]``.
        key, value: ``[b, groups, keys, d]``; ``n`` is a multiple of ``groups``.
        begin, end: int64 ``[1 or b, s]``; neither moves back from a query to the next.

    Returns:
        ``[b, n, s, d]``, zero where a query sees nothing. Same bits whatever the number of threads. A NaN among keys or
        values may spread to neighbouring queries that do not see it, as in torch's attention.

    Raises:
        RuntimeError: naming the argument that does not fit.
    """
    if not _has_kernel(query):
        return reference.interval_attention(query, key, value, begin, end, scale)
    return kernels.interval_attention(query, key, value, begin, end, scale)


def serves_intervals(query: Tensor) -> bool:
    """True where the kernel takes such queries, and they are enough to pay for packing the keys."""
    return query.shape[2] >= FEWEST_QUERIES and _has_kernel(query)


def pays_over_dense(query: Tensor, key: Tensor, runs: Runs) -> bool:
    """True where the kernel is quicker than torch's attention over all keys (measured: docs/performance.md).

    Scores of longer runs leave the core's cache; and threads share out heads of keys in the backward pass.
    """
    if not serves_intervals(query) or key.shape[0] * key.shape[1] < _MIN_HEADS:
        return False
    return query.shape[2] <= _LONGEST_RUN or bool((runs[1] - runs[0]).max() <= _LONGEST_RUN)


def _has_kernel(query: Tensor) -> bool:
    """Of 16-bit numbers the matrix units behind torch's own products make more than vectors can."""
    wide = query.dtype in (torch.float32, torch.float64)
    return query.is_cpu and wide and query.shape[3] % 16 == 0 and registry.serves(query)


def runs_of_keys(
    num_queries: int,
    num_keys: int,
    *,
    causal: bool,
    offset: int = 0,
    pattern: SparsePattern | None = None,
    visible: Tensor | None = None,
    segments: Tensor | None = None,
) -> Runs | None:
    """``begin`` and ``end`` for ``interval_attention``; None where the keys of some query are not one run.

    Args:
        offset, pattern, visible, segments: as ``sparse_attention`` takes them; no pattern: it hides nothing.
    """
    if (pattern is not None and pattern.kind != "local") or (visible is not None and visible.shape[2] != 1):
        return None
    position = torch.arange(offset, offset + num_queries)[None]
    begin, end = torch.zeros_like(position), position + 1 if causal else torch.full_like(position, num_keys)
    if pattern is not None:
        reach = pattern.window - 1 if causal else pattern.window // 2
        begin, end = (position - reach).clamp_(min=0), torch.minimum(end, position + reach + 1)
    if segments is not None:
        documents = _documents(segments)
        if documents is None:
            return None
        first, last = (x[:, offset : offset + num_queries] for x in documents)
        begin, end = torch.maximum(begin, first), torch.minimum(end, last)
    if visible is not None:
        seen = _one_run(visible[:, 0, 0])
        if seen is None:
            return None
        begin, end = torch.maximum(begin, seen[0]), torch.minimum(end, seen[1])
    return begin, end


def _documents(segments: Tensor) -> Runs | None:
    """For each token of ``segments [b, s]`` its document; None where a number may come again after another one."""
    before, after = segments[:, :-1], segments[:, 1:]
    if bool((after < before).any()):
        return None
    new, place = after != before, torch.arange(segments.shape[1]).expand_as(segments)
    first = torch.cat([torch.zeros_like(place[:, :1]), place[:, 1:].where(new, 0)], 1).cummax(1).values
    stop = torch.cat([place[:, 1:].where(new, place.shape[1]), torch.full_like(place[:, :1], place.shape[1])], 1)
    return first, stop.flip(1).cummin(1).values.flip(1)


def _one_run(seen: Tensor) -> Runs | None:
    """Where the True of each row of ``seen [b, keys]`` begin and end, ``[b, 1]``; None where they are not together."""
    count = seen.sum(1, keepdim=True)
    place = torch.arange(seen.shape[1])
    first = torch.where(seen, place, seen.shape[1]).amin(1, keepdim=True)
    stop = torch.where(seen, place + 1, 0).amax(1, keepdim=True)
    if bool(((stop - first != count) & (count > 0)).any()):
        return None
    return first, stop
