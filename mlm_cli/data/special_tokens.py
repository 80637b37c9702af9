"""What the families' samples need of a tokenizer, checked before the first step."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from mlm_cli.data.tokenizer import Tokenizer
from mlm_cli.data.words import Words, single_tokens, words_of
from mlm_cli.errors import DataError

_UNUSED = re.compile(r"\[unused\d+\]")  # places that BERT's published vocabularies keep free


@dataclass(frozen=True)
class BertTokens:
    """Ids of BERT's special tokens; ``replacements`` int64 [r]: ids of text. ``eod``: what ends documents, or None."""

    cls: int
    sep: int
    mask: int
    pad: int
    eod: int | None
    vocab_size: int
    replacements: np.ndarray
    whole_words: Words

    def words(self, *, whole: bool) -> Words:
        return self.whole_words if whole else single_tokens(self.vocab_size)


@dataclass(frozen=True)
class T5Tokens:
    """Ids of T5's special tokens; ``sentinels`` int64 [n]: marks of masked spans, in the order they are used."""

    pad: int
    eos: int
    sentinels: np.ndarray
    vocab_size: int


def bert_tokens(tokenizer: Tokenizer) -> BertTokens:
    """BERT's view of a tokenizer.

    Raises:
        DataError: it lacks one of the special tokens, which are named.
    """
    roles = {
        "[CLS]": tokenizer.cls_id,
        "[SEP]": tokenizer.sep_id,
        "[MASK]": tokenizer.mask_id,
        "[PAD]": tokenizer.pad_id,
    }
    missing = [name for name, number in roles.items() if number is None]
    if missing:
        raise DataError(
            f"tokenizer `{tokenizer.spec}` has no {', '.join(missing)} token, which BERT needs",
            hint="train one with `mlm tokenizer train --special-tokens bert` (any --kind), or name a BERT tokenizer",
        )
    cls, sep, mask, pad = (number for number in roles.values() if number is not None)
    text = {number for token, number in tokenizer.token_ids.items() if not _UNUSED.fullmatch(token)}
    replacements = np.array(sorted(text - tokenizer.special_ids), dtype=np.int64)
    words = words_of(tokenizer)
    return BertTokens(cls, sep, mask, pad, tokenizer.eod_id, tokenizer.vocab_size, replacements, words)


def t5_tokens(tokenizer: Tokenizer, num_sentinels: int) -> T5Tokens:
    """T5's view of a tokenizer; ``num_sentinels``: spans of a sample.

    Raises:
        DataError: no padding, no end of text, or too few sentinels.
    """
    pad, eos, sentinels = tokenizer.pad_id, tokenizer.eod_id, tokenizer.sentinel_ids
    train = "train one with `mlm tokenizer train --special-tokens t5` (any --kind)"
    missing = [name for name, number in (("padding", pad), ("end-of-text", eos)) if number is None]
    if pad is None or eos is None:
        raise DataError(
            f"tokenizer `{tokenizer.spec}` has no {' and no '.join(missing)} token, which T5 needs", hint=train
        )
    if len(sentinels) < num_sentinels:
        raise DataError(
            f"tokenizer `{tokenizer.spec}` has {len(sentinels)} sentinels (<extra_id_0> ...), and a sample masks "
            f"{num_sentinels} spans",
            hint=f"{train}, or use a smaller model.seq_length or a larger data.span_corruption.mean_length",
        )
    return T5Tokens(pad, eos, np.array(sentinels, dtype=np.int64), tokenizer.vocab_size)


class Frame:
    """What stands around the ids of a text that a model is to go on from, or to read as a whole.

    Where the tokenizer's own template begins a text with its beginning-of-sequence token (Llama's does, GPT-2's does
    not), so do we: a model asked in `transformers` sees the same ids. No ids at all are the beginning of a document:
    the beginning-of-sequence token, or else the end-of-document token that precedes every document in training.

    Args:
        ends: the end-of-document token closes a text, as an encoder has been taught.
    """

    def __init__(self, tokenizer: Tokenizer, *, ends: bool = False) -> None:
        template = tokenizer.reference.encode("", add_special_tokens=True).ids
        begins = bool(template) and tokenizer.bos_id is not None and template[0] == tokenizer.bos_id
        self.begin = [template[0]] if begins else []
        self.end = [tokenizer.eod_id] if ends and tokenizer.eod_id is not None else []
        self._nothing = [number for number in (tokenizer.bos_id, tokenizer.eod_id) if number is not None][:1]

    def around(self, ids: list[int]) -> list[int]:
        """The whole row; empty only where ``ids`` are, and the tokenizer has no token that begins a text."""
        return [*self.begin, *ids, *self.end] or self._nothing
