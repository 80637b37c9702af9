"""Keys and values of tokens already seen, kept for decoding; room for all of them is made once."""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one layer: ``[b, kv heads of this rank, max_length, d]`` each."""

    __slots__ = ("keys", "values")

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def append(self, key: Tensor, value: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """Store ``key, value [b, n, s, d]`` from ``offset`` on; returns all keys and values up to there."""
        end = offset + key.shape[2]
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        keys[:, :, offset:].copy_(key)
        values[:, :, offset:].copy_(value)
        return keys, values


class KVCache:
    """Caches of all layers. Rows of different length are padded on the left.

    Attributes:
        length: tokens stored so far, padding included.
        start: ``[b]`` padding tokens at the left of each row; None: no row has any. Set before the first tokens.
    """

    def __init__(self, layers: list[LayerCache], max_length: int, start: Tensor | None = None) -> None:
        self.layers, self.max_length, self.start, self.length = layers, max_length, start, 0

    @property
    def batch_size(self) -> int:
        return self.layers[0].keys.shape[0]

    def select(self, rows: Tensor) -> KVCache:
        """A cache of the given rows ``[rows]`` (repeated and reordered as asked): finished rows leave, beams fork."""
        layers = []
        for layer in self.layers:
            chosen = LayerCache.__new__(LayerCache)
            chosen.keys, chosen.values = layer.keys.index_select(0, rows), layer.values.index_select(0, rows)
            layers.append(chosen)
        start = None if self.start is None else self.start.index_select(0, rows)
        cache = KVCache(layers, self.max_length, start)
        cache.length = self.length
        return cache

    def truncate(self, length: int) -> None:
        """Forget all tokens from ``length`` on."""
        assert 0 <= length <= self.length
        self.length = length

    def spread(self, rows: int, room: int) -> KVCache:
        """A cache of ``rows`` rows that all begin with what this one row holds, with room for ``room`` tokens more."""
        assert self.batch_size == 1 and self.start is None
        layers = []
        for layer in self.layers:
            shape = (rows, layer.keys.shape[1], self.length + room, layer.keys.shape[3])
            made = LayerCache(shape, layer.keys.dtype, layer.keys.device)
            made.keys[:, :, : self.length] = layer.keys[:, :, : self.length]
            made.values[:, :, : self.length] = layer.values[:, :, : self.length]
            layers.append(made)
        cache = KVCache(layers, self.length + room)
        cache.length = self.length
        return cache
