"""Training tokenizers: BPE, WordPiece and Unigram, from a stream of documents, by the ``tokenizers`` library."""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from mlm_cli import log
from mlm_cli.data.tokenizer import Tokenizer
from mlm_cli.data.tokenizer_files import TokenizerFiles
from mlm_cli.data.tokenizer_pieces import (
    END_OF_TEXT,
    added_token,
    bert_normalizer,
    bert_template,
    byte_level,
    end_template,
)
from mlm_cli.errors import DataError, UsageError

KINDS = ("bpe", "wordpiece", "unigram")
_SET_OF_KIND = {"bpe": "gpt", "wordpiece": "bert", "unigram": "t5"}
_BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_BERT_ROLES = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
_T5_ROLES = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
_NUM_SENTINELS = 100
_NUM_BYTES = 256
_NEVER = -1000.0  # score of pieces that text must not be cut into
_TOO_MANY_CHARACTERS = "not large enough to contain all chars"  # what the library's Unigram trainer says


def train_tokenizer(
    read: Callable[[], Iterable[str] | None],
    *,
    kind: str,
    vocab_size: int,
    lowercase: bool = False,
    min_frequency: int = 2,
    special_tokens: str | None = None,
    byte_fallback: bool = False,
) -> Tokenizer:
    """Train a tokenizer; memory grows with the number of different words, not with the text.

    At most half of a WordPiece or Unigram vocabulary is single characters where the text has too many of them for it
    (Han characters, say): the rarest are left out, to be unknown or, with byte fallback, spelled in bytes.

    Args:
        read: gives the texts from the beginning; called again for WordPiece, and when characters have to be left out.
            None then says that they cannot be read again: a WordPiece vocabulary is then another each time.
        kind: `bpe` (byte-level, as GPT-2: Radford et al. 2019; every byte has a token), `wordpiece` (BERT: Devlin et
            al. 2019), `unigram` (SentencePiece: Kudo 2018).
        vocab_size: special tokens included; the result may be smaller when the text gives fewer, never larger.
        special_tokens: `gpt` (`<|endoftext|>`), `bert` (`[PAD] [UNK] [CLS] [SEP] [MASK]`) or `t5` (`<pad> </s> <unk>`
            first, and the 100 sentinels `<extra_id_99>` ... `<extra_id_0>` last, as T5's). None: gpt for bpe, bert for
            wordpiece, t5 for unigram.
        byte_fallback: unigram: 256 tokens for the bytes of characters that have no token, so that no text is unknown.

    Raises:
        UsageError: a vocabulary too small for what it has to hold; byte fallback of another kind. DataError: no text,
            or text that would have to be read again and cannot be.
    """
    chosen = special_tokens or _SET_OF_KIND[kind]
    if byte_fallback and kind != "unigram":
        why = "a bpe vocabulary holds every byte already" if kind == "bpe" else "WordPiece has no bytes"
        raise UsageError(f"--byte-fallback is for --kind unigram: {why}", hint="leave it out")
    extra = (_NUM_SENTINELS if chosen == "t5" else 0) + (_NUM_BYTES if byte_fallback else 0)
    roles, names = _special(kind, chosen)
    smallest = (_NUM_BYTES + len(names) if kind == "bpe" else 32) + extra
    if vocab_size < smallest:
        raise UsageError(
            f"a {kind} vocabulary of {vocab_size} is too small", hint=f"give --vocab-size {smallest} or more"
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    start, trainer = _untrained(kind, vocab_size - extra, lowercase, min_frequency, names, roles.get("unk_token"))
    seen = _Counter(read() or (), count=kind == "unigram")
    definition = _train(start, trainer, seen)
    if definition is None:
        keep = _commonest(seen.counts, (vocab_size - extra - len(names)) // 2, lowercase=lowercase)
        again, num = read(), len(seen.counts)
        if again is None:
            raise DataError(
                f"the text has {num:,} different characters, too many for a vocabulary of {vocab_size:,}, and cannot "
                "be read again to leave out the rarest",
                hint=f"give --vocab-size {2 * num + extra} or more, or the text as a file",
            )
        log.warn(f"{num - len(keep):,} of {num:,} characters are left out, which are too rare for this vocabulary")
        rare = dict.fromkeys((ord(character) for character in seen.counts if character not in keep), " ")
        definition = _train(start, trainer, _Counter(text.translate(rare) for text in again))
        if definition is None:
            raise UsageError(f"a {kind} vocabulary of {vocab_size} is too small", hint="give a larger --vocab-size")
    if kind == "wordpiece" and (again := read()) is not None:
        definition = _number_continuations(start, trainer, names, definition, _Counter(again))
    _add_bytes_and_sentinels(definition, byte_fallback=byte_fallback, sentinels=chosen == "t5")
    files = TokenizerFiles(definition, roles, kind)
    ids = {entry["content"]: entry["id"] for entry in definition["added_tokens"]}
    if chosen == "bert":
        definition["post_processor"] = bert_template(ids)
    if chosen == "t5":
        definition["post_processor"] = end_template("</s>", ids["</s>"])
    return Tokenizer(files, kind)


def _train(start: dict[str, Any], trainer: Any, texts: _Counter) -> dict[str, Any] | None:
    """The trained ``tokenizer.json``, or None for a Unigram vocabulary with less room than there are characters."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(start))
    try:
        tokenizer.train_from_iterator(texts, trainer)
    except Exception as error:
        if texts.error is not None:
            raise texts.error from None  # an exception of ours that passed through the library
        if _TOO_MANY_CHARACTERS in str(error):
            return None
        raise DataError(f"training failed: {str(error).splitlines()[0]}", hint="is there enough text?") from error
    if texts.error is not None:
        raise texts.error
    if not texts.characters:
        raise DataError("no text to train on")
    found: dict[str, Any] = json.loads(tokenizer.to_str())
    return found


def _number_continuations(
    start: dict[str, Any], trainer: Any, names: list[str], found: dict[str, Any], texts: _Counter
) -> dict[str, Any]:
    """Train WordPiece once more, now with single continuations (``##a``) numbered in order: equal texts, equal tokens.

    The library numbers them as its hash map of words happens to lie, which decides between equally common pairs too.
    Those that stand first, as special tokens do, keep their number; special they are not, and are taken off that list.
    """
    pieces = sorted(token for token in found["model"]["vocab"] if token.startswith("##") and len(token) == len("##a"))
    trainer.special_tokens = [*names, *pieces]
    definition = _train(start, trainer, texts)
    assert definition is not None, "a vocabulary that held these characters does so again"
    known = set(pieces)
    definition["added_tokens"] = [entry for entry in definition["added_tokens"] if entry["content"] not in known]
    return definition


def _commonest(counts: Counter[str], limit: int, *, lowercase: bool) -> set[str]:
    """The commonest characters that come to at most ``limit`` different ones once the text is normalised."""
    kept: set[str] = set()
    normal: set[str] = set()
    for character, _ in counts.most_common():
        new = set(unicodedata.normalize("NFKC", character.lower() if lowercase else character)) - normal
        if len(normal) + len(new) <= limit:
            kept.add(character)
            normal |= new
    return kept


def _special(kind: str, chosen: str) -> tuple[dict[str, str], list[str]]:
    """(named special tokens, all special tokens in the order of their ids)."""
    if chosen == "bert":
        return dict(zip(_BERT_ROLES, _BERT_SPECIAL, strict=True)), list(_BERT_SPECIAL)
    if chosen == "t5":
        return dict(_T5_ROLES), list(_T5_ROLES.values())
    unknown = {"wordpiece": ["[UNK]"], "unigram": ["<unk>"]}.get(kind, [])
    roles = {"eos_token": END_OF_TEXT} | ({"unk_token": unknown[0]} if unknown else {})
    return roles, [*unknown, END_OF_TEXT]


def _add_bytes_and_sentinels(definition: dict[str, Any], *, byte_fallback: bool, sentinels: bool) -> None:
    """Append what is not learnt: byte pieces, then `<extra_id_99>` ... `<extra_id_0>`."""
    model = definition["model"]
    if byte_fallback:
        model["vocab"] += [[f"<0x{byte:02X}>", _NEVER] for byte in range(_NUM_BYTES)]
        model["byte_fallback"] = True
        definition["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, definition["decoder"]]}
    if sentinels:
        first = len(model["vocab"])
        for place in range(_NUM_SENTINELS):
            name = f"<extra_id_{_NUM_SENTINELS - 1 - place}>"
            definition["added_tokens"].append(added_token(name, first + place))


class _Counter:
    """Passes texts on; remembers how much there was, of which characters, and what went wrong while reading it."""

    def __init__(self, texts: Iterable[str], *, count: bool = False) -> None:
        self._texts, self._count = iter(texts), count
        self.characters = 0
        self.counts: Counter[str] = Counter()
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
        if self._count:
            self.counts.update(text)
        return text


def _untrained(
    kind: str, vocab_size: int, lowercase: bool, min_frequency: int, special: list[str], unknown: str | None
) -> tuple[dict[str, Any], Any]:
    """(definition without a vocabulary, trainer)."""
    from tokenizers import pre_tokenizers, trainers

    show = sys.stderr.isatty() and not log.is_quiet()
    empty: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": []}
    empty |= dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    if kind == "bpe":
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        bpe = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=alphabet,
            min_frequency=min_frequency,
            show_progress=show,
        )
        lower = {"type": "Lowercase"} if lowercase else None
        parts = {"normalizer": lower, "pre_tokenizer": byte_level(), "decoder": byte_level()}
        return empty | parts | {"model": {"type": "BPE", "vocab": {}, "merges": []}}, bpe
    if kind == "wordpiece":
        pieces = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            min_frequency=min_frequency,
            limit_alphabet=(vocab_size - len(special)) // 2,  # each may stand at the beginning, and with ## within
            show_progress=show,
        )
        parts = {
            "normalizer": bert_normalizer(lowercase=lowercase),
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        }
        model = {
            "type": "WordPiece",
            "unk_token": unknown,
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {unknown: 0},
        }
        return empty | parts | {"model": model}, pieces
    unigram = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=special, unk_token=unknown, show_progress=show
    )
    steps: list[dict[str, Any]] = [{"type": "NFKC"}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]
    if lowercase:
        steps.append({"type": "Lowercase"})
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    parts = {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": space, "decoder": space}
    return empty | parts | {"model": {"type": "Unigram", "unk_id": None, "vocab": []}}, unigram
