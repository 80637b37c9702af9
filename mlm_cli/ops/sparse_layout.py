"""The plan of a pass: which queries are taken together, and which keys each of these chunks is multiplied with."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mlm_cli.ops.sparse_pattern import SparsePattern

# Queries taken together where neighbours see nearly the same keys. More: fewer, larger products; also more scores that
# are computed and then hidden (64 of 576 with a window of 512; the products of a core are at their best from here).
CHUNK_QUERIES = 64

_LINE = 16  # float32 numbers of a cache line


@dataclass(frozen=True)
class Chunk:
    """Queries ``start..stop`` and the keys that any of them sees.

    Attributes:
        start, stop: rows of the query tensor.
        keys: columns of the key tensor: a slice where they lie together, else their indices.
        positions: of the keys, ``[keys]``.
        hidden: boolean ``[rows, keys]``, True where the pattern hides a key; None: it hides none.
        band: ``(offset, window)`` where ``hidden`` is what ``scaled_causal_softmax`` does with these.
    """

    start: int
    stop: int
    keys: slice | Tensor
    positions: Tensor
    hidden: Tensor | None
    band: tuple[int, int | None] | None


@dataclass(frozen=True)
class Layout:
    """The chunks of a pass, in order; together they hold each query once."""

    chunks: tuple[Chunk, ...]


@lru_cache(maxsize=32)
def layout_of(
    pattern: SparsePattern, num_queries: int, num_keys: int, causal: bool, offset: int, device: torch.device
) -> Layout:
    """The layout for queries at positions ``offset..offset + num_queries`` over keys ``0..num_keys``; kept."""
    bounds = _bounds(pattern, offset, offset + num_queries, causal)
    mask = pattern.block_mask(-(-(offset + num_queries) // pattern.block), -(-num_keys // pattern.block), causal=causal)
    all_keys = torch.arange(num_keys)
    seen_before: dict[bytes, Tensor] = {}
    chunks = []
    for first, last in itertools.pairwise(bounds):
        blocks = mask[first // pattern.block : -(-last // pattern.block)].any(0)
        keys = all_keys[torch.from_numpy(np.repeat(blocks, pattern.block)[:num_keys])]
        seen = pattern.visible(torch.arange(first, last)[:, None], keys[None, :], causal=causal)
        used = seen.any(0)
        keys, seen = keys[used], seen[:, used]
        if _together(keys):  # rows of scores begin at cache lines: a few hidden keys more make the products faster
            keys = all_keys[int(keys[0]) // _LINE * _LINE : -(-int(keys[-1] + 1) // _LINE) * _LINE]
            seen = pattern.visible(torch.arange(first, last)[:, None], keys[None, :], causal=causal)
        chunks.append(_chunk(pattern, first, last, keys, ~seen, offset, causal, seen_before, device))
    return Layout(tuple(chunks))


def _together(keys: Tensor) -> bool:
    """True where the keys are one run of at least one."""
    return keys.numel() > 0 and int(keys[-1] - keys[0]) + 1 == keys.numel()


def _bounds(pattern: SparsePattern, first: int, last: int, causal: bool) -> list[int]:
    """Positions at which a new chunk begins, and the end. Global queries, which see every key, are by themselves."""
    step = pattern.block
    if pattern.kind in ("local", "longformer", "fixed"):  # neighbours share most keys
        step *= max(1, CHUNK_QUERIES // pattern.block)
    bounds = {first, last, *range(-(-first // step) * step, last, step)}
    if not causal and pattern.kind in ("longformer", "bigbird") and first < pattern.global_tokens < last:
        bounds.add(pattern.global_tokens)
    return sorted(bounds)


def _chunk(
    pattern: SparsePattern, first: int, last: int, keys: Tensor, hidden: Tensor, offset: int, causal: bool,
    seen_before: dict[bytes, Tensor], device: torch.device,
) -> Chunk:  # fmt: skip
    together, begin = _together(keys), int(keys[0]) if keys.numel() else 0
    where = slice(begin, begin + keys.numel()) if together else keys.to(device)
    band = (first - begin, pattern.window) if together and causal and pattern.kind == "local" else None
    mask: Tensor | None = None
    if bool(hidden.any()):  # most chunks of a regular pattern have the same mask: keep one
        mask = seen_before.setdefault(hidden.numpy().tobytes() + bytes(str(hidden.shape), "ascii"), hidden.to(device))
    return Chunk(first - offset, last - offset, where, keys.to(device), mask, band)
