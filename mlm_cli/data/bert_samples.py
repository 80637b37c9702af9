"""Samples of BERT: runs of sentences, in pairs or alone, with tokens hidden anew each time a sample is drawn.

Devlin et al. 2019, appendix A.2, with the sentence order of ALBERT (Lan et al. 2020) where the recipe says so, as
Megatron-LM's ``bert_dataset.py``. Which sentences a sample holds: ``sentence_runs.py``; which tokens are hidden:
``masking.py``. A sample is a function of (data, seed, number) alone.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlm_cli.data.masking import Masking, budget
from mlm_cli.data.order import derive_key, draws
from mlm_cli.data.packed import Arrays
from mlm_cli.data.sentence_runs import Run, SentenceRuns
from mlm_cli.data.special_tokens import BertTokens
from mlm_cli.data.token_stream import TokenStore, TokenStream
from mlm_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from mlm_cli.config.schema import MaskingSection

_TRIES = 1000
_FRACTION = 2.0**-64
_SAMPLE, _MASK, _TRIM, _OTHER = 5, 6, 7, 8  # what a derived key is for


@dataclass(frozen=True)
class _Texts:
    """The text of a sample before it is hidden: B is empty for a single text."""

    first: np.ndarray
    second: np.ndarray
    label: int


class BertSamples(TokenStream):
    """Samples of one indexed data set whose sequences are sentences, or of some of its documents.

    ``[CLS] A [SEP] B [SEP]`` (``binary_head`` sentence_order: A and B follow each other, half the time in the wrong
    order; next_sentence: half the time B is from another document), or ``[CLS] text [SEP]`` (none). A run longer than
    there is room for loses tokens one at a time from the front or back of the longer part. With probability
    ``masking.short_sequences`` a sample is cut to a length between 2 and the full one.

    Args:
        dataset: the indexed tokens.
        documents: which documents; None: all.
        seq_length: longest sample, special tokens included.
        seed, stream: decide everything drawn; ``stream`` keeps the parts of a blend apart.
        binary_head: none, sentence_order or next_sentence.
        masking: what is hidden.
        tokens: special tokens and words of the vocabulary.
        name: how errors call the data.

    Attributes:
        max_predictions: hidden tokens of the longest sample.

    Raises:
        DataError: no text, or pairs asked of data that were not split into sentences.
        UsageError: a seq_length too short for a pair.
    """

    def __init__(
        self,
        dataset: TokenStore,
        documents: range | None = None,
        *,
        seq_length: int,
        seed: int,
        stream: int = 0,
        binary_head: str,
        masking: MaskingSection,
        tokens: BertTokens,
        name: str | None = None,
    ) -> None:
        super().__init__(dataset, documents, vocab_size=tokens.vocab_size, name=name)
        self.seq_length, self.seed, self.stream, self.binary_head = seq_length, seed, stream, binary_head
        self.section, self.special = masking, tokens
        self.room = seq_length - (2 if binary_head == "none" else 3)
        if self.room < 4:
            raise UsageError(
                f"`model.seq_length` {seq_length} leaves BERT no text", hint="use `model.seq_length=8` or more"
            )
        shortest = 1 if binary_head == "none" else 2
        self.require(shortest, "one sample")
        if binary_head != "none":
            self._check_pairs()
        self.runs = SentenceRuns(
            self,
            length=self.room,
            shortest=shortest,
            seed=seed,
            stream=stream,
            eod_id=tokens.eod,
        )
        self.samples_per_epoch = self.runs.num_slots
        self.max_predictions = budget(seq_length, masking.probability)
        self.masking = Masking(
            tokens.words(whole=masking.whole_words),
            tokens.mask,
            tokens.replacements,
            probability=masking.probability,
            max_ngram=masking.max_ngram,
        )

    def _check_pairs(self) -> None:
        index, documents = self.dataset.document_index, self.documents
        sentences = int(index[documents.stop]) - int(index[documents.start])
        if sentences <= len(documents):
            raise DataError(
                f"{self.name} is not split into sentences ({sentences:,} in {len(documents):,} documents), and "
                f"`model.binary_head` {self.binary_head} pairs sentences",
                hint="preprocess it with --split-sentences, or use `model.binary_head=none`",
            )
        if self.binary_head == "next_sentence" and len(documents) < 2:
            raise DataError(
                f"{self.name} is one document, and `model.binary_head` next_sentence pairs sentences of two",
                hint="use `model.binary_head=sentence_order`, or give more documents",
            )

    def get(self, number: int) -> Arrays:
        """The ``number``-th sample over all epochs, of s <= ``seq_length`` tokens and m hidden ones.

        Returns:
            ``tokens`` (with tokens hidden) and ``token_types`` (0 up to A's `[SEP]`, then 1) int64 [s], ``positions``
            and ``labels`` int64 [m]; with a binary head ``binary_label`` int64 [1], 1 for a wrong order or random B.
        """
        key = derive_key(self.seed, self.stream, number, _SAMPLE)
        texts = self._texts(self.runs.find(number), key)
        special, size, other = self.special, len(texts.first), len(texts.second)
        length = 2 + size + (other + 1 if self.binary_head != "none" else 0)
        tokens = np.full(length, special.sep, dtype=np.int64)
        tokens[0] = special.cls
        tokens[1 : 1 + size] = texts.first
        token_types = np.zeros(length, dtype=np.int64)
        spans = [(1, 1 + size)]
        if self.binary_head != "none":
            tokens[2 + size : 2 + size + other] = texts.second
            token_types[2 + size :] = 1
            spans.append((2 + size, 2 + size + other))
        masked = self.masking(tokens, spans, derive_key(key, _MASK))
        sample = {"tokens": masked.tokens, "token_types": token_types}
        sample |= {"positions": masked.positions, "labels": masked.labels}
        if self.binary_head != "none":
            sample["binary_label"] = np.array([texts.label], dtype=np.int64)
        return sample

    def _texts(self, run: Run, key: int) -> _Texts:
        """A and B of a run, of ``room`` tokens together or fewer."""
        chance, size, place, pivot, coin = draws(key, 5).tolist()
        target = self.room
        if chance * _FRACTION < self.section.short_sequences:
            target = 2 + size % (self.room - 1)
            run = self._shorter(run, target, place)
        text = self.read(run.begin - self.start, run.end - self.start)
        if self.binary_head == "none":
            return _Texts(_trim(text, len(text) - target, derive_key(key, _TRIM)), text[:0], 0)
        if len(run.sentences):
            cut = int(run.sentences[pivot % len(run.sentences)]) - run.begin
        else:  # one long sentence
            cut = 1 + pivot % (len(text) - 1)
        first, second, label = text[:cut], text[cut:], coin >> 63
        if label and self.binary_head == "next_sentence":
            second = self._random_text(run.document, max(1, target - cut), derive_key(key, _OTHER))
        elif label:
            first, second = second, first
        return _Texts(*_trim_pair(first, second, target, derive_key(key, _TRIM)), label)

    def _shorter(self, run: Run, target: int, place: int) -> Run:
        """Sentences of a run from a drawn one on, until there are ``target`` tokens; at least two for a pair."""
        bounds = [run.begin, *run.sentences.tolist(), run.end]
        enough = 1 if self.binary_head == "none" else 2
        # drawn from those behind which there are enough tokens and sentences
        first = place % max(1, min(bisect_right(bounds, run.end - target), len(bounds) - enough))
        last = min(len(bounds) - 1, max(first + enough, bisect_left(bounds, bounds[first] + target)))
        return Run(run.document, bounds[first], bounds[last], run.sentences[first : last - 1])

    def _random_text(self, document: int, size: int, key: int) -> np.ndarray:
        """Some ``size`` tokens of another document, from the beginning of a sentence on.

        Raises:
            DataError: no other document holds text.
        """
        index, documents = self.dataset.document_index, self.documents
        for attempt in range(_TRIES):
            drawn = derive_key(key, attempt)
            other = documents.start + drawn % (len(documents) - 1)
            other += other >= document
            begin, end = self.runs.span(other)
            if begin == end:
                continue
            low, high = int(index[other]), int(index[other + 1])
            sentence = low + derive_key(drawn) % (high - low)
            begin = min(int(self.dataset.offsets[sentence]) // self.dataset.dtype.itemsize, end - 1)
            later = self.runs.sentences(other, begin + size - 1, min(end, begin + size + self.room))
            stop = int(later[0]) if len(later) else min(end, begin + size + self.room)
            return self.read(begin - self.start, stop - self.start)
        raise DataError(f"{self.name}: next to all of its documents are empty", hint="preprocess it without them")

    def collate(self, samples: Sequence[Mapping[str, np.ndarray | None]], numbers: Sequence[int]) -> Arrays:
        """Stack samples into the arrays of one micro-batch; ``numbers``: what each was got by.

        Returns:
            ``tokens`` and ``token_types`` int64 [b, s], padded on the right with the pad id and 0; ``lengths`` int64
            [b]; ``masked_positions`` and ``labels`` int64 [b, m] and ``loss_mask`` float32 [b, m], 1 where real, with
            m = ``max_predictions``; ``sample_ids`` int64 [b]; with a binary head ``binary_labels`` int64 [b].
        """
        num = len(samples)
        batch: Arrays = {
            "tokens": np.full((num, self.seq_length), self.special.pad, dtype=np.int64),
            "token_types": np.zeros((num, self.seq_length), dtype=np.int64),
            "lengths": np.zeros(num, dtype=np.int64),
            "masked_positions": np.zeros((num, self.max_predictions), dtype=np.int64),
            "labels": np.zeros((num, self.max_predictions), dtype=np.int64),
            "loss_mask": np.zeros((num, self.max_predictions), dtype=np.float32),
            "sample_ids": np.array(numbers, dtype=np.int64),
        }
        for row, sample in enumerate(samples):
            tokens, positions = np.asarray(sample["tokens"]), np.asarray(sample["positions"])
            batch["lengths"][row] = len(tokens)
            batch["tokens"][row, : len(tokens)] = tokens
            batch["token_types"][row, : len(tokens)] = sample["token_types"]
            batch["masked_positions"][row, : len(positions)] = positions
            batch["labels"][row, : len(positions)] = sample["labels"]
            batch["loss_mask"][row, : len(positions)] = 1.0
        if self.binary_head != "none":
            batch["binary_labels"] = np.concatenate([np.asarray(sample["binary_label"]) for sample in samples])
        return batch

    @property
    def settings(self) -> tuple[Any, ...]:
        return ("bert", self.seq_length, self.seed, self.stream, self.binary_head, *self.section.model_dump().values())


def _trim(text: np.ndarray, excess: int, key: int) -> np.ndarray:
    """Take ``excess`` tokens off a text, each from the front or the back by the toss of a coin."""
    if excess <= 0:
        return text
    front = int((draws(key, excess) >> np.uint64(63)).sum())
    return text[front : len(text) - (excess - front)]


def _trim_pair(first: np.ndarray, second: np.ndarray, target: int, key: int) -> tuple[np.ndarray, np.ndarray]:
    """BERT's ``truncate_seq_pair``: the longer of the two loses a token until ``target`` are left."""
    one, other = len(first), len(second)
    for _ in range(one + other - target):
        if one > other:
            one -= 1
        else:
            other -= 1
    return _trim(first, len(first) - one, key), _trim(second, len(second) - other, derive_key(key))
