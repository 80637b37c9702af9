"""Training tokenizers: BPE, WordPiece and Unigram, from a stream of documents, by the ``tokenizers`` library."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from typing import Any

from mlm_cli import log
from mlm_cli.data.tokenizer import Tokenizer
from mlm_cli.data.tokenizer_files import (
    END_OF_TEXT,
    TokenizerFiles,
    bert_normalizer,
    bert_template,
    byte_level,
)
from mlm_cli.errors import DataError, UsageError

KINDS = ("bpe", "wordpiece", "unigram")
_BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_BERT_ROLES = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


def train_tokenizer(
    texts: Iterable[str], *, kind: str, vocab_size: int, lowercase: bool = False, min_frequency: int = 2
) -> Tokenizer:
    """Train a tokenizer; memory grows with the number of different words, not with the text.

    Args:
        kind: `bpe` (byte-level, as GPT-2: Radford et al. 2019; `<|endoftext|>` is id 0, every byte has a token),
            `wordpiece` (BERT: Devlin et al. 2019), `unigram` (SentencePiece: Kudo 2018).
        vocab_size: special tokens included; the result may be smaller when the text gives fewer.

    Raises:
        UsageError: a vocabulary too small for the kind. DataError: no text.
    """
    smallest = 257 if kind == "bpe" else 32
    if vocab_size < smallest:
        raise UsageError(
            f"a {kind} vocabulary of {vocab_size} is too small", hint=f"give --vocab-size {smallest} or more"
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import tokenizers

    start, trainer = _untrained(kind, vocab_size, lowercase, min_frequency)
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(start))
    seen = _Counter(texts)
    try:
        tokenizer.train_from_iterator(seen, trainer)
    except Exception as error:
        if seen.error is not None:
            raise seen.error from None  # an exception of ours that passed through the library
        raise DataError(f"training failed: {str(error).splitlines()[0]}", hint="is there enough text?") from error
    if seen.error is not None:
        raise seen.error
    if not seen.characters:
        raise DataError("no text to train on")
    definition = json.loads(tokenizer.to_str())
    special = {"eos_token": END_OF_TEXT}
    if kind == "wordpiece":
        special = dict(zip(_BERT_ROLES, _BERT_SPECIAL, strict=True))
        definition["post_processor"] = bert_template(definition["model"]["vocab"])
    if kind == "unigram":
        special |= {"unk_token": "<unk>"}
    return Tokenizer(TokenizerFiles(definition, special, kind), kind)


class _Counter:
    """Passes texts on; remembers how much there was, and what went wrong while reading it."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = iter(texts)
        self.characters = 0
        self.error: BaseException | None = None

    def __iter__(self) -> _Counter:
        return self

    def __next__(self) -> str:
        try:
            text = next(self._texts)
        except StopIteration:
            raise
        except BaseException as error:  # the library would print it and go on
            self.error = error
            raise StopIteration from None
        self.characters += len(text)
        return text


def _untrained(kind: str, vocab_size: int, lowercase: bool, min_frequency: int) -> tuple[dict[str, Any], Any]:
    """(definition without a vocabulary, trainer)."""
    from tokenizers import pre_tokenizers, trainers

    show = sys.stderr.isatty() and not log.is_quiet()
    empty: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": []}
    empty |= dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    if kind == "bpe":
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        bpe = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=alphabet,
            min_frequency=min_frequency,
            show_progress=show,
        )
        lower = {"type": "Lowercase"} if lowercase else None
        parts = {"normalizer": lower, "pre_tokenizer": byte_level(), "decoder": byte_level()}
        return empty | parts | {"model": {"type": "BPE", "vocab": {}, "merges": []}}, bpe
    if kind == "wordpiece":
        pieces = trainers.WordPieceTrainer(
            vocab_size=vocab_size, special_tokens=list(_BERT_SPECIAL), min_frequency=min_frequency, show_progress=show
        )
        parts = {
            "normalizer": bert_normalizer(lowercase=lowercase),
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        }
        model = {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {"[UNK]": 0},
        }
        return empty | parts | {"model": model}, pieces
    unigram = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=["<unk>", END_OF_TEXT], unk_token="<unk>", show_progress=show
    )
    steps: list[dict[str, Any]] = [{"type": "NFKC"}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]
    if lowercase:
        steps.append({"type": "Lowercase"})
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    parts = {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": space, "decoder": space}
    return empty | parts | {"model": {"type": "Unigram", "unk_id": None, "vocab": []}}, unigram
