"""Decoding of a model that reads a text with an encoder and answers with a decoder of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mlm_cli.generation.decoder import Decoder
from mlm_cli.generation.slots import copy_rows
from mlm_cli.models.t5 import T5

_FIRST_KEYS = 64


class EncoderDecoder(Decoder):
    """Cached decoding of up to ``num_slots`` answers at once; see ``Decoder``.

    A prompt is read once: its keys and values for every decoder layer are kept beside those of the answer.

    Args:
        model: in eval mode.
        num_slots: texts at once.
        max_length: tokens an answer may have, the one it begins with included.
        start_id: begins every answer (the padding token).
        keep_states: see ``Decoder``.
    """

    def __init__(
        self, model: T5, num_slots: int = 1, *, max_length: int, start_id: int, keep_states: bool = False
    ) -> None:
        super().__init__(model, num_slots, max_length, fused=False, keep_states=keep_states)  # type: ignore[arg-type]
        self.t5, self.start_id = model, start_id
        self._read = _CrossSlots(model, num_slots)

    def prefix(self, prompt: Sequence[int]) -> Sequence[int]:
        return [self.start_id]

    @torch.inference_mode()
    def _drop(self, row: int) -> None:
        super()._drop(row)
        self._read.drop(row)

    @torch.inference_mode()
    def _arrange(self, sources: Sequence[int]) -> None:
        self._read.arrange(sources, self._slots.shared)
        super()._arrange(sources)

    @torch.inference_mode()
    def _extend(self, row: int, tokens: Sequence[int]) -> Tensor:
        """Read ``tokens`` and begin an answer; what an encoder has read cannot grow."""
        slots, model = self._slots, self.t5
        assert row == slots.used, "an encoder reads a text as a whole"
        device = model.parallel.device
        keys = model.cross_keys(model.encode(torch.tensor([tokens], device=device)))
        self._read.add(keys)
        slots.begin_row()
        cache = slots.row_cache(row)
        start = torch.tensor([[self.start_id]], device=device)
        hidden = model.decode(start, start.new_zeros(1), cache.layers, keys, num_keys=1)
        slots.lengths[row] = 1
        self._keep(hidden[0])
        return model.gather_logits(model.logits(hidden[0, -1]))

    @torch.inference_mode()
    def _step(self, tokens: Sequence[int]) -> Tensor:
        slots, model = self._slots, self.t5
        slots.begin_step()
        slots.visible()  # tells the caches which rows are in use; what they may see is in the bias
        new = torch.tensor(tokens, device=model.parallel.device)[:, None]
        keys, visible = self._read.all()
        hidden = model.decode(new, slots.positions, list(slots.layers), keys, num_keys=slots.longest, visible=visible)
        self._keep(hidden[:, 0])
        return model.gather_logits(model.logits(hidden))[:, 0]


class _CrossSlots:
    """Keys and values of what each row's encoder has read, ``[slots, n, capacity, d]``, rows in use first."""

    def __init__(self, model: T5, num_slots: int) -> None:
        self._model, self._num_slots = model, num_slots
        self.lengths: list[int] = []
        self._cache = model.new_cache(num_slots, _FIRST_KEYS)

    def add(self, keys: list[tuple[Tensor, Tensor]]) -> None:
        """The next row: keys and values ``[1, n, s, d]`` of every layer."""
        row, length = len(self.lengths), keys[0][0].shape[2]
        if length > self._cache.max_length:
            self._grow(max(length, 2 * self._cache.max_length))
        for layer, (key, value) in zip(self._cache.layers, keys, strict=True):
            layer.keys[row, :, :length], layer.values[row, :, :length] = key[0], value[0]
        self.lengths.append(length)

    def _grow(self, capacity: int) -> None:
        old, self._cache = self._cache, self._model.new_cache(self._num_slots, capacity)
        for mine, other in zip(self._cache.layers, old.layers, strict=True):
            mine.keys[:, :, : old.max_length], mine.values[:, :, : old.max_length] = other.keys, other.values

    def drop(self, row: int) -> None:
        """Forget a row; the last one takes its place."""
        last = len(self.lengths) - 1
        for layer in self._cache.layers if row != last else ():
            layer.keys[row], layer.values[row] = layer.keys[last], layer.values[last]
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def arrange(self, sources: Sequence[int], shared: np.ndarray) -> None:
        """Row ``i`` becomes what row ``sources[i]`` was. Rows with ``shared`` tokens in their answers read one text."""
        tensors = [tensor for layer in self._cache.layers for tensor in (layer.keys, layer.values)]
        lengths = [self.lengths[source] for source in sources]
        copy_rows(tensors, lengths, sources, np.where(shared > 0, self._cache.max_length, 0))
        self.lengths = lengths

    def all(self) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
        """Of every layer the rows in use, as long as the longest; and ``[b, 1, 1, keys]``, which are tokens."""
        count, longest = len(self.lengths), max(self.lengths)
        found = [(layer.keys[:count, :, :longest], layer.values[:count, :, :longest]) for layer in self._cache.layers]
        if min(self.lengths) == longest:
            return found, None
        device = found[0][0].device
        ends = torch.tensor(self.lengths, device=device)[:, None]
        return found, (torch.arange(longest, device=device) < ends)[:, None, None]
