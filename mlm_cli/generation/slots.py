"""Keys and values of several texts that grow at their own pace, without padding.

A text occupies one row. Rows in use are always the first ones, so that a step over all of them needs no gather; a text
that ends leaves its row to the last one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mlm_cli.models.cache import KVCache, LayerCache
from mlm_cli.models.gpt import GPT

_FIRST_CAPACITY = 256


class _SlotLayer(LayerCache):
    """One layer's keys and values ``[slots, kv heads of this rank, capacity, d]``; knows where each row goes on."""

    __slots__ = ("slots",)

    slots: Slots

    def append(self, key: Tensor, value: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """Store the one new token of each row, ``[b, n, 1, d]``, behind that row; ``offset`` is not used."""
        slots = self.slots
        count, end = slots.used, slots.longest
        if slots.even:
            self.keys[:count, :, end - 1 : end].copy_(key)
            self.values[:count, :, end - 1 : end].copy_(value)
        else:
            self.keys[slots.rows, :, slots.positions] = key[:, :, 0]
            self.values[slots.rows, :, slots.positions] = value[:, :, 0]
        return self.keys[:count, :, :end], self.values[:count, :, :end]


class Slots:
    """The cache of a decoder: ``num_slots`` rows with room for ``max_length`` tokens each, made as it is needed.

    Attributes:
        lengths: tokens stored in each row in use.
        positions: [b] where the token of the current step goes, on the model's device.
        tensors: keys and values of the layers in turn.
        shared: ``[slots, slots]`` tokens that two rows have in common at their beginning, as far as one was copied to
            the other.
    """

    def __init__(self, model: GPT, num_slots: int, max_length: int) -> None:
        self._model, self.num_slots, self.max_length = model, num_slots, max_length
        self.lengths: list[int] = []
        self.shared = np.zeros((num_slots, num_slots), dtype=np.int64)
        self.capacity = 0
        self.layers: list[_SlotLayer] = []
        self.rows = self.positions = torch.empty(0, dtype=torch.int64)
        self.tensors: list[Tensor] = []
        self.even, self.longest = True, 0
        self.reserve(min(_FIRST_CAPACITY, max_length))

    @property
    def used(self) -> int:
        return len(self.lengths)

    def begin_row(self) -> None:
        """An empty row behind those in use."""
        self.shared[self.used] = self.shared[:, self.used] = 0
        self.lengths.append(0)

    def reserve(self, length: int) -> None:
        """Make room for rows of ``length`` tokens; at least doubles, so that growing costs little in sum."""
        if length <= self.capacity:
            return
        capacity = min(self.max_length, max(length, 2 * self.capacity))
        made = self._model.new_cache(self.num_slots, capacity).layers
        layers = []
        for index, fresh in enumerate(made):
            layer = _SlotLayer.__new__(_SlotLayer)
            layer.keys, layer.values, layer.slots = fresh.keys, fresh.values, self
            if self.layers and self.used:
                old = self.layers[index]
                layer.keys[: self.used, :, : self.capacity] = old.keys[: self.used]
                layer.values[: self.used, :, : self.capacity] = old.values[: self.used]
            layers.append(layer)
        self.layers, self.capacity = layers, capacity
        self.tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]

    def row_cache(self, row: int) -> KVCache:
        """The model's own kind of cache over one row, for passes of many tokens."""
        layers = []
        for layer in self.layers:
            view = LayerCache.__new__(LayerCache)
            view.keys, view.values = layer.keys[row : row + 1], layer.values[row : row + 1]
            layers.append(view)
        cache = KVCache(layers, self.capacity)
        cache.length = self.lengths[row]
        return cache

    def drop(self, row: int) -> None:
        """Forget a row; the last row moves into its place."""
        last = self.used - 1
        if row != last:
            length = self.lengths[last]
            for layer in self.layers:
                layer.keys[row, :, :length] = layer.keys[last, :, :length]
                layer.values[row, :, :length] = layer.values[last, :, :length]
            self.lengths[row] = length
            self.shared[row], self.shared[:, row] = self.shared[last], self.shared[:, last]
        self.shared[last] = self.shared[:, last] = 0
        self.lengths.pop()

    def arrange(self, sources: Sequence[int]) -> None:
        """Row ``i`` becomes what row ``sources[i]`` was; there are as many rows as ``sources`` from now on."""
        lengths, old = [self.lengths[source] for source in sources], np.array(sources, dtype=np.int64)
        copy_rows(self.tensors, lengths, sources, self.shared)
        same = old[:, None] == old
        self.shared[: len(old), : len(old)] = np.where(same, np.array(lengths), self.shared[np.ix_(old, old)])
        self.shared[len(old) :] = self.shared[:, len(old) :] = 0
        self.lengths = lengths

    def begin_step(self) -> None:
        """Every row in use grows by one token, to be stored by whoever runs the coming step."""
        lengths = self.lengths
        self.longest = max(lengths) + 1
        assert self.longest <= self.max_length, "there is no room for what comes behind a full context"
        self.reserve(self.longest)
        self.even = min(lengths) == self.longest - 1
        self.positions = torch.tensor(lengths, device=self.layers[0].keys.device)
        self.lengths = [length + 1 for length in lengths]

    def visible(self) -> Tensor | None:
        """``[b, 1, 1, longest]``: which keys each row sees in the current step; None where all rows see all."""
        if self.even:
            return None
        device = self.positions.device
        self.rows = torch.arange(self.used, device=device)
        return (torch.arange(self.longest, device=device) <= self.positions[:, None])[:, None, None]


def copy_rows(tensors: Sequence[Tensor], lengths: Sequence[int], sources: Sequence[int], shared: np.ndarray) -> None:
    """Row ``i`` of ``tensors [slots, n, capacity, d]`` becomes what row ``sources[i]`` was, ``lengths[i]`` long.

    Args:
        shared: ``[slots, slots]``, what two rows have in common at their beginning, which is not copied.
    """
    moved = [(row, source) for row, source in enumerate(sources) if row != source]
    if not moved:
        return
    begin = min(int(shared[pair]) for pair in moved)
    end = max(lengths[row] for row, _ in moved)
    if begin < end:
        rows, old = torch.tensor(moved, device=tensors[0].device).T
        for tensor in tensors:
            tensor[rows, :, begin:end] = tensor[old, :, begin:end]
