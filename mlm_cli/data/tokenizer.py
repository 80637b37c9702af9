"""Text -> token ids and back, for every kind of tokenizer file. Imports neither torch nor transformers."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_cli.data.tokenizer_files import NAMED, TokenizerFiles, read_tokenizer
from mlm_cli.data.tokenizer_pieces import byte_characters
from mlm_cli.errors import DataError

if TYPE_CHECKING:
    import tokenizers

# tried in this order where no file names the end-of-sequence token; [SEP] is what ends a text for BERT
_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>", "[EOS]", "[SEP]")
# what a role's token is called where no file names it; special tokens only
_ROLES = {
    "pad_token": ("[PAD]", "<pad>"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": ("[MASK]", "<mask>"),
}
_SENTINEL = re.compile(r"<extra_id_(\d+)>")
_SPACE = "\u2581"


def load_tokenizer(spec: str | os.PathLike[str]) -> Tokenizer:
    """Load a tokenizer.

    Args:
        spec: a folder or file with ``tokenizer.json``, GPT-2's ``vocab.json``/``encoder.json`` + ``merges.txt``/
            ``vocab.bpe``, BERT's ``vocab.txt`` or a SentencePiece ``.model``; a run or checkpoint folder; a Hub name;
            or ``bytes``.

    Raises:
        DataError: nothing there, or it does not load.
    """
    text = os.fspath(spec)
    collecting = gc.isenabled()
    gc.disable()  # nothing of the hundred thousand objects made here is garbage
    try:
        return Tokenizer(read_tokenizer(text), text)
    finally:
        if collecting:
            gc.enable()


class Tokenizer:
    """One tokenizer definition (the content of a ``tokenizer.json``) with its special tokens.

    Attributes:
        vocab_size: largest id + 1, added tokens included.
        eod_id: ends a document (None if the tokenizer has no such token); bos_id, pad_id, unk_id, cls_id, sep_id,
            mask_id: likewise.
        fingerprint: sha256 of everything that decides the ids of a text; equal for copies in other file formats.
    """

    def __init__(self, files: TokenizerFiles, spec: str) -> None:
        self.spec = spec
        self.name = files.name
        self.definition = files.definition
        self._text = files.text
        self.special = {role: token for role, token in files.special.items() if token in self.token_ids}
        for role, names in _ROLES.items():
            known = next((name for name in names if self.token_ids.get(name) in self.special_ids), None)
            if known is not None:
                self.special.setdefault(role, known)
        self.vocab_size = max(self.token_ids.values()) + 1
        end = self.special.get("eos_token") or next((token for token in _END_TOKENS if token in self.token_ids), None)
        self.eod_token = end
        self.eod_id = self.token_ids[end] if end is not None else None
        self.bos_id = self._special_id("bos_token")
        self.pad_id = self._special_id("pad_token")
        self.unk_id = self._special_id("unk_token")
        self.cls_id = self._special_id("cls_token")
        self.sep_id = self._special_id("sep_token")
        self.mask_id = self._special_id("mask_token")

    def _special_id(self, role: str) -> int | None:
        token = self.special.get(role)
        return self.token_ids[token] if token is not None else None

    @cached_property
    def token_ids(self) -> dict[str, int]:
        """Every token, added ones included, as written in the definition -> id."""
        vocab = self.definition["model"]["vocab"]
        known = dict(vocab) if isinstance(vocab, dict) else {token: number for number, (token, _) in enumerate(vocab)}
        for entry in self.definition.get("added_tokens") or []:
            known[entry["content"]] = entry["id"]
        return known

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of tokens that are markers, not text."""
        entries = self.definition.get("added_tokens") or []
        return frozenset(entry["id"] for entry in entries if entry.get("special"))

    @cached_property
    def sentinel_ids(self) -> tuple[int, ...]:
        """Ids of ``<extra_id_0>``, ``<extra_id_1>`` ... as far as they go without a gap: T5's marks of masked spans."""
        found = {}
        for token, number in self.token_ids.items():
            if match := _SENTINEL.fullmatch(token):
                found[int(match.group(1))] = number
        return tuple(found[number] for number in takewhile(found.__contains__, count()))

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.definition)

    @cached_property
    def definition_json(self) -> str:
        """The definition as the text of a ``tokenizer.json``."""
        return self._text or json.dumps(self.definition, ensure_ascii=False)

    @cached_property
    def reference(self) -> tokenizers.Tokenizer:
        """The definition loaded by the ``tokenizers`` library: what every other backend must agree with."""
        import tokenizers

        try:
            return tokenizers.Tokenizer.from_str(self.definition_json)
        except Exception as error:  # the library raises bare Exception
            reason = str(error).splitlines()[0]
            raise DataError(f"tokenizer `{self.spec}` does not load: {reason}") from error

    def encode(self, text: str) -> list[int]:
        """Ids of one text; no special tokens are added around it."""
        ids: list[int] = self.reference.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; no special tokens are added around them."""
        return [found.ids for found in self.reference.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of ids. Bytes that are no UTF-8 become U+FFFD; ids outside the vocabulary are left out."""
        text: str = self.reference.decode([int(number) for number in ids], skip_special_tokens=skip_special)
        return text

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Exact bytes of ids.

        Raises:
            DataError: a kind whose tokens are not pieces of bytes (WordPiece), or an id outside the vocabulary.
        """
        pieces = []
        for number in ids:
            piece = self.token_bytes(int(number))
            if piece is None:
                raise DataError(f"tokenizer `{self.spec}`: id {int(number)} stands for no bytes")
            pieces.append(piece)
        return b"".join(pieces)

    def token_bytes(self, number: int) -> bytes | None:
        """Bytes that one id adds to the text; None where that depends on its neighbours or the id is unknown."""
        return self._bytes_of_ids.get(number)

    @cached_property
    def _bytes_of_ids(self) -> dict[int, bytes]:
        whole = {entry["content"] for entry in self.definition.get("added_tokens") or []}
        if self.kind == "byte-level BPE":
            table = {character: byte for byte, character in enumerate(byte_characters())}

            def piece(token: str) -> bytes | None:
                if any(character not in table for character in token):
                    return None
                return bytes(table[character] for character in token)

        elif self.definition["model"]["type"] in ("BPE", "Unigram"):

            def piece(token: str) -> bytes | None:
                if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                    return bytes([int(token[3:5], 16)])
                return token.replace(_SPACE, " ").encode("utf-8")

        else:
            return {}
        found = {}
        for token, number in self.token_ids.items():
            content = token.encode("utf-8") if token in whole else piece(token)
            if content is not None:
                found[number] = content
        return found

    @cached_property
    def kind(self) -> str:
        """``byte-level BPE``, ``BPE``, ``WordPiece``, ``Unigram`` or ``WordLevel``."""
        kind: str = self.definition["model"]["type"]
        if kind == "BPE" and '"ByteLevel"' in json.dumps(
            [self.definition.get("pre_tokenizer"), self.definition.get("normalizer")]
        ):
            return "byte-level BPE"
        return kind

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, as ``transformers.AutoTokenizer`` opens them."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        (target / "tokenizer.json").write_text(self.definition_json.rstrip("\n") + "\n", encoding="utf-8")
        special = dict(self.special)
        if self.eod_token is not None and self.definition["model"]["type"] != "WordPiece":
            special.setdefault("eos_token", self.eod_token)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 10**30,  # transformers' own "unknown": the model's config knows
            **{role: special[role] for role in NAMED if role in special},
        }
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (target / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def __repr__(self) -> str:
        return f"Tokenizer({self.spec!r}, {self.kind}, {self.vocab_size} tokens)"


# parts of a definition that change offsets or the way back to text, never ids
_NO_IDS = frozenset({"trim_offsets", "cache_capacity", "max_input_chars_per_word_is_default"})
# what an absent key means, so that files of older and newer libraries agree
_DEFAULTS: dict[str, Any] = {
    "use_regex": True,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "unk_token": None,
    "dropout": None,
}


def _canonical(part: Any) -> Any:
    if isinstance(part, dict):
        return {
            key: _canonical(value)
            for key, value in part.items()
            if key not in _NO_IDS and (key not in _DEFAULTS or value not in (_DEFAULTS[key], ""))
        }
    return [_canonical(item) for item in part] if isinstance(part, list) else part


def fingerprint(definition: dict[str, Any]) -> str:
    """sha256 (hex) over what decides ids: vocabulary, merges, model settings, normalizer, word splitting, added tokens.

    Offsets, decoding, templates of special tokens, padding and the order of keys do not count, so that one tokenizer
    has one fingerprint whichever file format or library version it was saved by.
    """
    model = definition["model"]
    vocab = model["vocab"]
    normalizer = _canonical(definition.get("normalizer"))
    known = dict(vocab) if isinstance(vocab, dict) else {}
    added = []
    # without a normalizer, whether an added token is matched before or after it makes no difference
    flags = ("single_word", "lstrip", "rstrip", *(("normalized",) if normalizer else ()))
    for entry in sorted(definition.get("added_tokens") or [], key=lambda entry: entry["id"]):
        known[entry["content"]] = entry["id"]
        added.append([entry["content"], entry["id"], [bool(entry.get(flag)) for flag in flags]])
    numbers = list(known.values())
    tokens = list(known) if numbers == list(range(len(known))) else sorted(known, key=known.__getitem__)
    # seven digits: libraries write the last bits of a score differently each time they save it
    scored = [[token, f"{score:.7g}"] for token, score in vocab] if isinstance(vocab, list) else []
    content = {
        "tokens": tokens,
        "gaps": [] if len(known) == max(numbers, default=-1) + 1 else sorted(numbers),
        "scored": scored,
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []],
        "model": _canonical({key: value for key, value in model.items() if key not in ("vocab", "merges")}),
        "normalizer": normalizer,
        "pre_tokenizer": _canonical(definition.get("pre_tokenizer")),
        "added": added,
    }
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()
