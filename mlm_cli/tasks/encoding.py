"""From texts to rows of ids as the family was pretrained: ``[CLS] a [SEP] b [SEP]`` for BERT, plain for GPT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlm_cli.config.schema import ModelSection
from mlm_cli.data.special_tokens import bert_tokens
from mlm_cli.data.tokenizer import Tokenizer
from mlm_cli.errors import UsageError


@dataclass(frozen=True)
class Row:
    """One sequence as the model reads it: ``ids`` int64 [s], never empty; ``types`` int64 [s], 1 for a second text.

    ``begin_first``, ``begin_second``: where the texts' own tokens begin, ``len_first``, ``len_second`` of them.
    """

    ids: np.ndarray
    types: np.ndarray
    begin_first: int
    len_first: int
    begin_second: int = 0
    len_second: int = 0

    def __len__(self) -> int:
        return len(self.ids)


class TextEncoder:
    """Rows for one model.

    A causal model's texts stand plain; a pair is joined by the end-of-document token (a line break where there is
    none), and an empty text becomes one such token.

    Args:
        model: the section of the model that will read the rows.
        max_length: longest row, at most the model's context.

    Raises:
        UsageError: ``max_length`` leaves no room for text.
        DataError: a BERT model with a tokenizer that lacks ``[CLS]``, ``[SEP]``, ``[MASK]`` or ``[PAD]``.
    """

    def __init__(self, tokenizer: Tokenizer, model: ModelSection, max_length: int) -> None:
        self.tokenizer, self.max_length, self.family = tokenizer, max_length, model.family
        self.two_types = model.num_token_types > 1
        self.before: list[int] = []
        self.between: list[int] = [tokenizer.eod_id] if tokenizer.eod_id is not None else tokenizer.encode("\n")
        self.after: list[int] = []
        self.marked = model.family == "bert"
        self.pad_id = pad_id_of(tokenizer)
        if self.marked:
            special = bert_tokens(tokenizer)
            self.before, self.between, self.after = [special.cls], [special.sep], [special.sep]
        if self.room(pair=True) < 1:
            raise UsageError(
                f"texts of {max_length} tokens at most leave no room for text beside what marks its beginning and end",
                hint="use a longer task.max_length",
            )

    def room(self, *, pair: bool = False) -> int:
        """Tokens of text that a row has room for."""
        return max(self.max_length - len(self.before) - len(self.after) - (len(self.between) if pair else 0), 0)

    def rows(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Row]:
        """A row for each text, or each pair. Too long texts lose their end; of a pair the longer is cut first."""
        first = self.tokenizer.encode_batch(texts)
        if pairs is None:
            return [self.join(ids) for ids in first]
        return [self.join(a, b) for a, b in zip(first, self.tokenizer.encode_batch(pairs), strict=True)]

    def join(self, first: Sequence[int], second: Sequence[int] | None = None) -> Row:
        """One row of ids without marks."""
        if second is None:
            kept = list(first[: self.room()])
            ids = [*self.before, *kept, *self.after] or self.between[:1]
            return Row(_array(ids), np.zeros(len(ids), np.int64), len(self.before), len(kept))
        room = self.room(pair=True)
        # The shorter keeps all it has while the longer gives way, down to halves; as transformers does it.
        short, long = sorted((len(first), len(second)))
        keep_short = min(short, max(room - long, room // 2))
        keep_long = min(long, room - keep_short)
        keep_first, keep_second = (keep_short, keep_long) if len(first) <= len(second) else (keep_long, keep_short)
        head = [*self.before, *first[:keep_first], *self.between]
        ids = [*head, *second[:keep_second], *self.after][: self.max_length]
        types = np.zeros(len(ids), np.int64)
        if self.marked and self.two_types:
            types[len(head) :] = 1
        return Row(_array(ids), types, len(self.before), keep_first, len(head), keep_second)


def pad_id_of(tokenizer: Tokenizer) -> int:
    """The id that fills up short texts; any will do for a causal model, where nothing is read behind a text."""
    if tokenizer.pad_id is not None:
        return tokenizer.pad_id
    return tokenizer.eod_id if tokenizer.eod_id is not None else 0


def _array(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, dtype=np.int64)
