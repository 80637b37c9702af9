"""Samples of T5: windows of the token stream with spans masked anew each time one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlm_cli.data.order import derive_key, epoch_shift, sample_position
from mlm_cli.data.packed import Arrays
from mlm_cli.data.span_corruption import SpanLengths, corrupt, noise_mask
from mlm_cli.data.special_tokens import T5Tokens
from mlm_cli.data.token_stream import TokenStore, TokenStream
from mlm_cli.errors import UsageError

if TYPE_CHECKING:
    from mlm_cli.config.schema import SpanCorruptionSection

_SPANS = 9  # what a derived key is for


class T5Samples(TokenStream):
    """Samples of one indexed data set, or of some of its documents.

    The stream is cut into windows of ``lengths.raw`` tokens, as many as fill ``lengths.inputs`` once their spans are
    masked, at places that move from epoch to epoch; an epoch shows each window once (as ``GPTSamples``). Windows cross
    documents, whose end-of-document ids stay in them.

    Args:
        dataset: the indexed tokens.
        documents: which documents; None: all.
        lengths: sizes of a sample (``span_corruption.lengths_for``).
        decoder_seq_length: length that targets are padded to; None: their own.
        seed, stream: decide everything drawn; ``stream`` keeps the parts of a blend apart.
        section: for the fingerprint.
        tokens: special tokens of the vocabulary, at least ``lengths.num_spans`` sentinels.
        name: how errors call the data.

    Raises:
        DataError: less text than one sample. UsageError: targets longer than ``decoder_seq_length``.
    """

    def __init__(
        self,
        dataset: TokenStore,
        documents: range | None = None,
        *,
        lengths: SpanLengths,
        decoder_seq_length: int | None = None,
        seed: int,
        stream: int = 0,
        section: SpanCorruptionSection,
        tokens: T5Tokens,
        name: str | None = None,
    ) -> None:
        super().__init__(dataset, documents, vocab_size=tokens.vocab_size, name=name)
        self.lengths, self.seed, self.stream, self.section, self.special = lengths, seed, stream, section, tokens
        self.decoder_seq_length = decoder_seq_length or lengths.targets
        if self.decoder_seq_length < lengths.targets:
            raise UsageError(
                f"`model.decoder_seq_length` {decoder_seq_length} is shorter than the {lengths.targets} tokens of the "
                f"targets that `model.seq_length` {lengths.inputs} and `data.span_corruption` give",
                hint="leave `model.decoder_seq_length` out",
            )
        self.require(lengths.raw, f"one sample of {lengths.raw:,} tokens with masked spans", "model.seq_length")
        self.samples_per_epoch = self.num_tokens // lengths.raw

    def get(self, number: int) -> Arrays:
        """The ``number``-th sample over all epochs: ``inputs`` int64 [inputs], ``targets`` int64 [targets]."""
        epoch, place = sample_position(number, self.samples_per_epoch, self.seed, self.stream)
        first = epoch_shift(self.lengths.raw, self.seed, epoch, self.stream) + place * self.lengths.raw
        tokens = self.read(first, first + self.lengths.raw)
        mask = noise_mask(self.lengths, derive_key(self.seed, self.stream, number, _SPANS))
        inputs, targets = corrupt(tokens, mask, self.special.sentinels, self.special.eos)
        return {"inputs": inputs, "targets": targets}

    def collate(self, samples: Sequence[Mapping[str, np.ndarray | None]], numbers: Sequence[int]) -> Arrays:
        """Stack samples into the arrays of one micro-batch; ``numbers``: what each was got by.

        Returns:
            ``tokens`` int64 [b, inputs]; ``labels`` int64 [b, d], the targets, and ``decoder_tokens`` int64 [b, d], the
            same one place later behind a pad id; ``loss_mask`` float32 [b, d], 1 on targets; ``sample_ids`` int64 [b].
        """
        shape = (len(samples), self.decoder_seq_length)
        labels = np.full(shape, self.special.pad, dtype=np.int64)
        labels[:, : self.lengths.targets] = np.stack([np.asarray(sample["targets"]) for sample in samples])
        decoder_tokens = np.full(shape, self.special.pad, dtype=np.int64)
        decoder_tokens[:, 1:] = labels[:, :-1]
        loss_mask = np.zeros(shape, dtype=np.float32)
        loss_mask[:, : self.lengths.targets] = 1.0
        return {
            "tokens": np.stack([np.asarray(sample["inputs"]) for sample in samples]),
            "decoder_tokens": decoder_tokens,
            "labels": labels,
            "loss_mask": loss_mask,
            "sample_ids": np.array(numbers, dtype=np.int64),
        }

    @property
    def settings(self) -> tuple[Any, ...]:
        shape = (self.lengths.raw, self.decoder_seq_length, self.seed, self.stream)
        return ("t5", *shape, *self.section.model_dump().values())
