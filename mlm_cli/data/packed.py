"""Tokens -> fixed-length samples for causal language models, without building or storing any index.

The documents of a split are one stream of tokens. An epoch cuts it into samples of ``seq_length`` inputs (plus one
token, the last label, shared with the next sample), at places that move from epoch to epoch, and visits them in the
order of ``order.permute``. Sample number -> tokens is therefore a pure function of (data, seed, number): independent
of ranks, workers and of where a run was resumed. Opening costs a few reads whatever the size of the corpus.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from mlm_cli.data.blend import Blend
from mlm_cli.data.order import epoch_shift, sample_position
from mlm_cli.data.token_stream import TokenStore, TokenStream

Arrays = dict[str, np.ndarray]


class Samples(Protocol):
    """An endless numbered supply of samples: what ``SampleSource`` blends."""

    samples_per_epoch: int
    num_tokens: int

    @property
    def fingerprint(self) -> str: ...

    def get(self, number: int) -> Mapping[str, np.ndarray | None]: ...

    def collate(self, samples: Sequence[Mapping[str, np.ndarray | None]], numbers: Sequence[int]) -> Arrays: ...


def restarted_positions(segments: np.ndarray) -> np.ndarray:
    """Positions int64 [b, s] that begin at 0 wherever the document number of ``segments`` [b, s] changes."""
    places = np.broadcast_to(np.arange(segments.shape[1], dtype=np.int64), segments.shape)
    begins = np.zeros(segments.shape, dtype=np.int64)
    changed = segments[:, 1:] != segments[:, :-1]
    begins[:, 1:] = np.where(changed, places[:, 1:], 0)
    return places - np.maximum.accumulate(begins, axis=1)


class GPTSamples(TokenStream):
    """Packed samples of one indexed data set, or of some of its documents.

    Args:
        dataset: the indexed tokens.
        documents: which documents; None: all.
        seq_length: inputs a sample.
        seed: picks the order and the cuts.
        stream: number of this data set in its blend, so that parts with one seed differ in order.
        mask_documents: also give the document number of each input (``segments``).
        vocab_size: refuse token ids from here on.
        name: how errors call the data, e.g. ``valid split of data/wiki``.

    Raises:
        DataError: fewer tokens than one sample needs (``seq_length + 1``), or sequences not back to back.
    """

    def __init__(
        self,
        dataset: TokenStore,
        documents: range | None = None,
        *,
        seq_length: int,
        seed: int,
        stream: int = 0,
        mask_documents: bool = False,
        vocab_size: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(dataset, documents, vocab_size=vocab_size, name=name)
        self.seq_length, self.seed, self.stream = seq_length, seed, stream
        self.mask_documents = mask_documents
        self.require(seq_length + 1, f"one sample of seq_length {seq_length:,}", "model.seq_length")
        self.samples_per_epoch = (self.num_tokens - 1) // seq_length

    def get(self, number: int) -> dict[str, np.ndarray | None]:
        """The ``number``-th sample over all epochs: ``tokens`` int64 [s+1], ``segments`` int32 [s] or None.

        Raises:
            DataError: a token id is not in the vocabulary.
        """
        epoch, place = sample_position(number, self.samples_per_epoch, self.seed, self.stream)
        shift = epoch_shift(self.seq_length, self.seed, epoch, self.stream)
        first = shift + place * self.seq_length
        tokens = self.read(first, first + self.seq_length + 1)
        return {"tokens": tokens, "segments": self._segments(first) if self.mask_documents else None}

    def collate(self, samples: Sequence[Mapping[str, np.ndarray | None]], numbers: Sequence[int]) -> Arrays:
        """Stack samples of s+1 tokens into the arrays of one micro-batch; ``numbers``: what each was got by.

        Returns:
            ``tokens`` and ``labels`` int64 [b, s] (labels are the next tokens), ``sample_ids`` int64 [b]; where
            samples have ``segments``: these, int32 [b, s], and ``positions`` int64 [b, s], anew in each document.
        """
        tokens = np.stack([np.asarray(sample["tokens"]) for sample in samples])
        batch = {
            "tokens": np.ascontiguousarray(tokens[:, :-1]),
            "labels": np.ascontiguousarray(tokens[:, 1:]),
            "sample_ids": np.array(numbers, dtype=np.int64),
        }
        if samples[0].get("segments") is not None:
            segments = np.stack([np.asarray(sample["segments"]) for sample in samples])
            batch["segments"] = segments
            batch["positions"] = restarted_positions(segments)
        return batch

    def _segments(self, first: int) -> np.ndarray:
        """Document number of each input of a sample, counted from 0 inside the sample; int32 [s].

        Boundaries come from the index, not from end-of-document tokens, so that data without these works too.
        """
        starts = np.zeros(self.seq_length, dtype=np.int32)
        done = 0
        while done < self.seq_length:
            begin = (first + done) % self.num_tokens
            length = min(self.seq_length - done, self.num_tokens - begin)
            bounds = self._boundaries(self.start + begin, self.start + begin + length)
            starts[bounds - (self.start + begin) + done] = 1
            if done:
                starts[done] = 1  # gone on at the beginning of the split: another document
            done += length
        starts[0] = 0
        return np.cumsum(starts, dtype=np.int32)

    def _boundaries(self, start: int, stop: int) -> np.ndarray:
        """Places in [start, stop), in tokens of the .bin, at which a document begins. Two binary searches."""
        offsets, documents = self.dataset.offsets, self.dataset.document_index
        size = self.dataset.dtype.itemsize
        # bisect, not np.searchsorted: columns of an .idx are not aligned, and numpy would copy all of one to align it
        low, high = (bisect_left(documents, bisect_left(offsets, place * size)) for place in (start, stop))
        found = np.asarray(documents[low:high], dtype=np.int64)
        places = np.asarray(offsets[found[found < len(offsets)]], dtype=np.int64) // size
        return places[(places >= start) & (places < stop)]

    @property
    def settings(self) -> tuple[Any, ...]:
        return (self.seq_length, self.seed, self.stream, self.mask_documents)


class SampleSource:
    """One split of the training data: a data set, or several blended by weight. Numbered without end.

    Args:
        parts: one supply of samples each.
        weights: of the parts; None for a single part.
    """

    def __init__(self, parts: Sequence[Samples], weights: Sequence[float] | None = None) -> None:
        if len(parts) > 1 and (weights is None or len(weights) != len(parts)):
            raise ValueError(f"{len(parts)} parts need as many weights")
        self.parts = tuple(parts)
        self.blend = Blend(weights) if weights is not None and len(parts) > 1 else None

    def get(self, number: int) -> Mapping[str, np.ndarray | None]:
        """Sample ``number`` (global, from 0, over all epochs)."""
        if self.blend is None:
            return self.parts[0].get(number)
        part, occurrence = self.blend.locate(number)
        return self.parts[part].get(occurrence)

    def collate(self, samples: Sequence[Mapping[str, np.ndarray | None]], numbers: Sequence[int]) -> Arrays:
        """Samples of any parts as one micro-batch: all parts of a blend are of one kind and length."""
        return self.parts[0].collate(samples, numbers)

    @property
    def num_tokens(self) -> int:
        """Distinct tokens of all parts."""
        return sum(part.num_tokens for part in self.parts)

    @property
    def samples_per_epoch(self) -> int:
        """Samples in one pass over every part (parts of a blend end their epochs at different times)."""
        return sum(part.samples_per_epoch for part in self.parts)

    @property
    def fingerprint(self) -> str:
        shares = [str(share) for share in self.blend.shares] if self.blend else []
        text = repr(([part.fingerprint for part in self.parts], shares))
        return hashlib.sha256(text.encode()).hexdigest()
