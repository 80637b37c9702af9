"""Attention in which a query sees some of the keys, at a cost that grows with those alone.

A block of queries is multiplied with the keys its pattern shows it (a slice of the keys where they lie together, else
gathered ones) around the fused softmax kernels, and so on to the next block. The backward pass makes the probabilities
of a block again instead of keeping them (Dao et al. 2022, section 3.1), so memory is linear in the sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlm_cli.ops import products
from mlm_cli.ops.intervals import interval_attention, runs_of_keys, serves_intervals
from mlm_cli.ops.softmax import scaled_causal_softmax, scaled_masked_softmax, softmax_gradient
from mlm_cli.ops.sparse_layout import Chunk, layout_of
from mlm_cli.ops.sparse_pattern import SparsePattern


@dataclass(frozen=True)
class _Setting:
    """What a call asks for beside its tensors."""

    pattern: SparsePattern
    causal: bool
    offset: int
    scale: float


class _Rule(TypedDict, total=False):
    """How a chunk's scores became probabilities, in ``softmax_gradient``'s words."""

    scale: float
    offset: int | None
    window: int | None


@dataclass(frozen=True)
class _Extra:
    """What else hides keys or moves scores; any may be None."""

    visible: Tensor | None  # [b or 1, 1, queries or 1, keys]
    segments: Tensor | None  # [b, keys]
    distance_bias: Tensor | None  # [n, 2 * reach + 1]

    def rows(self, first: int, last: int) -> _Extra:
        """The part for samples ``first..last``."""

        def part(x: Tensor | None) -> Tensor | None:
            return x if x is None or x.shape[0] == 1 else x[first:last]

        return _Extra(part(self.visible), part(self.segments), self.distance_bias)


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: SparsePattern,
    *,
    causal: bool,
    offset: int = 0,
    visible: Tensor | None = None,
    segments: Tensor | None = None,
    distance_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """``softmax(query key^T * scale + bias) value`` over the keys that the pattern and every mask show.

    Args:
        query: ``[b, n, s, d]``.
        key, value: ``[b, groups, keys, d]``; ``n`` is a multiple of ``groups`` (Ainslie et al. 2023).
        pattern: which keys a query sees by their positions; query ``i`` is at ``i + offset``, key ``j`` at ``j``.
        causal: no query sees a later key.
        offset: keys before the first query (cached generation).
        visible: boolean ``[b or 1, 1, s or 1, keys]``, True where a query may look besides; one row for all queries
            masks padding.
        segments: ``[b, keys]`` document numbers; a query sees only its own document. Unlike a whole mask of documents
            in ``visible`` this stays linear in memory.
        distance_bias: ``[n, 2 * reach + 1]``, added to scaled scores by the distance ``key - query``, cut off at
            ``-reach`` and ``reach`` (relative positions of T5).
        scale: unset: ``d ** -0.5``.

    Returns:
        ``[b, n, s, d]``. A query that sees no key gives zeros, and so do its gradients.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    b, n, s, d = query.shape
    groups, keys = key.shape[1:3]
    if key.shape != value.shape or key.shape[0] != b or key.shape[3] != d or n % groups:
        raise ValueError(f"query {list(query.shape)} does not fit key {list(key.shape)}, value {list(value.shape)}")
    if causal and offset + s > keys:
        raise ValueError(f"{s} causal queries from position {offset} on need {offset + s} keys, there are {keys}")
    scale = d**-0.5 if scale is None else scale
    if distance_bias is None and serves_intervals(query):
        masks = {"visible": visible, "segments": segments}
        runs = runs_of_keys(s, keys, causal=causal, offset=offset, pattern=pattern, **masks)
        if runs is not None:
            return interval_attention(query, key, value, *runs, scale)
    setting = _Setting(pattern, causal, offset, scale)
    return _SparseAttention.apply(query, key, value, distance_bias, visible, segments, setting)


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, distance_bias: Tensor | None, visible: Tensor | None,
        segments: Tensor | None, setting: _Setting,
    ) -> Tensor:  # fmt: skip
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        extra = _Extra(visible, segments, distance_bias)
        for part in _parts(query, key, value, extra, setting):
            part.forward(out)
        ctx.save_for_backward(query, key, value, distance_bias, visible, segments)
        ctx.setting = setting
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, distance_bias, visible, segments = ctx.saved_tensors
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
        grad_bias = None if distance_bias is None else torch.zeros_like(distance_bias, dtype=_wide(distance_bias))
        for part in _parts(query, key, value, _Extra(visible, segments, distance_bias), ctx.setting):
            part.backward(grad, grads, grad_bias)
        bias = None if distance_bias is None or grad_bias is None else grad_bias.to(distance_bias.dtype)
        return (*grads, bias, None, None, None)


def _wide(x: Tensor) -> torch.dtype:
    """The type that sums of many parts are kept in."""
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def _parts(query: Tensor, key: Tensor, value: Tensor, extra: _Extra, setting: _Setting) -> Iterator[_Part]:
    """A sample at a time on the CPU: its keys and values then stay in the cache from block to block."""
    rows = 1 if query.is_cpu else max(1, query.shape[0])
    for first in range(0, query.shape[0], rows):
        last = min(first + rows, query.shape[0])
        yield _Part(query, key, value, extra.rows(first, last), setting, slice(first, last))


class _Part:
    """Some samples: keys and values as ``[b * groups, keys, d]``, queries by group as ``[b * groups, repeats, s, d]``.

    Query heads that share a key head are stacked as more queries of it, so that keys are never repeated.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, extra: _Extra, setting: _Setting, samples: slice
    ) -> None:
        self.samples, self.extra, self.setting = samples, extra, setting
        _, self.heads, length, _ = query.shape
        self.repeats = self.heads // key.shape[1]
        self.query, self.key, self.value = self._grouped(query), self._flat(key), self._flat(value)
        self.chunks = layout_of(
            setting.pattern, length, key.shape[2], setting.causal, setting.offset, query.device
        ).chunks

    def _flat(self, x: Tensor) -> Tensor:
        return x[self.samples].flatten(0, 1).contiguous()

    def _grouped(self, x: Tensor) -> Tensor:
        return x[self.samples].unflatten(1, (-1, self.repeats)).flatten(0, 1).contiguous()

    def _rows(self, x: Tensor, chunk: Chunk) -> Tensor:
        """Queries of a chunk, ``[b * groups, repeats * rows, d]``."""
        return x[:, :, chunk.start : chunk.stop].flatten(1, 2)

    def _probs(self, chunk: Chunk, query: Tensor, key: Tensor) -> tuple[Tensor, _Rule]:
        """Probabilities ``[b, n, rows, keys]``, and what their gradient needs to know of the softmax."""
        rows, scale = chunk.stop - chunk.start, self.setting.scale
        scores = products.bmm(query, key.transpose(1, 2)).view(-1, self.heads, rows, key.shape[1])
        hidden, bias = self._hidden(chunk), self.extra.distance_bias
        if bias is not None:
            # Scores become final ones first: their gradient is then the bias's too.
            scores = (scores * scale + bias[:, self._distances(chunk, bias)]).to(scores.dtype)
            return scaled_masked_softmax(scores, hidden), {}
        if hidden is None and chunk.band is not None:
            offset, window = chunk.band
            rule: _Rule = {"scale": scale, "offset": offset, "window": window}
            return scaled_causal_softmax(scores, scale, offset=offset, window=window), rule
        return scaled_masked_softmax(scores, hidden, scale), {"scale": scale}

    def _hidden(self, chunk: Chunk) -> Tensor | None:
        """True where a key is hidden, broadcasting to ``[b, n, rows, keys]``; None where the pattern alone tells."""
        hidden: Tensor | None = None
        rows, keys = slice(chunk.start, chunk.stop), chunk.keys
        if (visible := self.extra.visible) is not None:
            hidden = ~_columns(visible if visible.shape[2] == 1 else visible[:, :, rows], keys)
        if (segments := self.extra.segments) is not None:
            mine = segments[:, self.setting.offset + chunk.start : self.setting.offset + chunk.stop]
            other = mine[:, None, :, None] != _columns(segments, keys)[:, None, None]
            hidden = other if hidden is None else hidden | other
        if hidden is None and chunk.band is not None and self.extra.distance_bias is None:
            return None
        pattern = chunk.hidden
        if hidden is None or pattern is None:
            return pattern if hidden is None else hidden
        return hidden | pattern

    def _distances(self, chunk: Chunk, bias: Tensor) -> Tensor:
        """Index into ``bias`` for each pair of a chunk, ``[rows, keys]``."""
        reach = bias.shape[1] // 2
        first = self.setting.offset + chunk.start
        query = torch.arange(first, first + chunk.stop - chunk.start, device=bias.device)
        return (chunk.positions[None, :] - query[:, None]).clamp_(-reach, reach).add_(reach)

    def forward(self, out: Tensor) -> None:
        """Fill ``out [b, n, s, d]`` for these samples."""
        out = out[self.samples]
        for chunk in self.chunks:
            key, value = _take(self.key, chunk.keys), _take(self.value, chunk.keys)
            probs, _ = self._probs(chunk, self._rows(self.query, chunk), key)
            rows = products.bmm(probs.view(key.shape[0], -1, key.shape[1]), value)
            out[:, :, chunk.start : chunk.stop] = rows.view(*out.shape[:2], -1, out.shape[3])

    def backward(self, grad_out: Tensor, grads: list[Tensor], grad_bias: Tensor | None) -> None:
        """Fill ``grads`` of query, key and value for these samples; add to ``grad_bias``."""
        grad_out = self._grouped(grad_out)
        grad_query, *sums = (whole[self.samples].flatten(0, 1) for whole in grads)  # views: `grads` are packed
        grad_query = grad_query.view(self.query.shape)
        if _wide(self.key) != self.key.dtype:
            grad_key, grad_value = (torch.zeros_like(x, dtype=_wide(x)) for x in sums)
        else:
            grad_key, grad_value = (x.zero_() for x in sums)
        for chunk in self.chunks:
            query, grad = self._rows(self.query, chunk), self._rows(grad_out, chunk)
            key, value = _take(self.key, chunk.keys), _take(self.value, chunk.keys)
            probs, rule = self._probs(chunk, query, key)
            grad_probs = products.bmm(grad, value.transpose(1, 2)).view_as(probs)
            grad_scores = softmax_gradient(grad_probs, probs, **rule)
            if grad_bias is not None:
                index = self._distances(chunk, grad_bias).flatten()
                grad_bias.index_add_(1, index, grad_scores.sum(0, dtype=grad_bias.dtype).flatten(1))
                grad_scores = grad_scores * self.setting.scale
            flat = grad_scores.view(key.shape[0], -1, key.shape[1])
            rows = products.bmm(flat, key).unflatten(1, (self.repeats, -1))
            grad_query[:, :, chunk.start : chunk.stop] = rows
            _add_product(grad_key, chunk.keys, flat, query)
            _add_product(grad_value, chunk.keys, probs.view_as(flat), grad)
        for whole, mine in zip(sums, (grad_key, grad_value), strict=True):
            if whole is not mine:
                whole.copy_(mine)


def _take(x: Tensor, keys: slice | Tensor) -> Tensor:
    return x[:, keys] if isinstance(keys, slice) else x.index_select(1, keys)


def _columns(mask: Tensor, keys: slice | Tensor) -> Tensor:
    return mask[..., keys] if isinstance(keys, slice) else mask.index_select(-1, keys)


def _add_product(total: Tensor, keys: slice | Tensor, left: Tensor, right: Tensor) -> None:
    """``total[:, keys] += left^T right``."""
    left = left.transpose(1, 2)
    if isinstance(keys, slice):  # `baddbmm_` into a part of each head's keys would go head by head
        total[:, keys] += products.bmm(left, right)
    else:
        total.index_add_(1, keys, products.bmm(left, right).to(total.dtype))
