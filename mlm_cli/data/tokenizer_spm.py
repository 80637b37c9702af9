"""A SentencePiece ``.model`` -> the content of a ``tokenizer.json``, without the sentencepiece package.

The file is one protobuf message (sentencepiece_model.proto); the few fields that decide token ids are read here.
The result follows Kudo & Richardson 2018 (https://arxiv.org/abs/1808.06226) as the C++ library implements it: the
normalizer's precompiled map, removal of extra spaces, U+2581 for spaces, then unigram or BPE over the whole text.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from typing import Any

from mlm_cli.data.tokenizer_pieces import bpe_model, definition_of

SPACE = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_UNIGRAM, _BPE = 1, 2
Field = int | bytes


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7


def _fields(data: bytes) -> Iterator[tuple[int, Field]]:
    """Yield (field number, value) of a protobuf message; fixed-width fields come as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            number, at = _varint(data, at)
            yield key >> 3, number
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError("not a SentencePiece model")
        if at + size > len(data):
            raise ValueError("not a SentencePiece model, or cut short")
        yield key >> 3, data[at : at + size]
        at += size


def _message(value: Field) -> dict[int, Field]:
    if not isinstance(value, bytes):
        raise ValueError("not a SentencePiece model")
    return dict(_fields(value))


def _text(value: Field) -> str:
    if not isinstance(value, bytes):
        raise ValueError("not a SentencePiece model")
    return value.decode("utf-8")


def sentencepiece_definition(data: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """(definition, named special tokens) of a model file's content.

    Raises:
        ValueError: not such a file, or a kind without an equivalent (word and char models).
    """
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Field] = {}
    normalizer: dict[int, Field] = {}
    try:
        for number, value in _fields(data):
            if number == 1:
                piece = _message(value)
                (score,) = struct.unpack("<f", piece.get(2, b"\0\0\0\0"))  # type: ignore[arg-type]
                pieces.append((_text(piece.get(1, b"")), score, int(piece.get(3, _NORMAL))))
            elif number == 2:
                trainer = _message(value)
            elif number == 3:
                normalizer = _message(value)
    except (IndexError, struct.error, TypeError, UnicodeDecodeError) as error:
        raise ValueError("not a SentencePiece model, or cut short") from error
    if not pieces:
        raise ValueError("not a SentencePiece model: it has no pieces")
    kind = int(trainer.get(3, _UNIGRAM))
    if kind not in (_UNIGRAM, _BPE):
        raise ValueError("a word or char SentencePiece model; unigram and BPE ones can be read")
    if not normalizer.get(5, 1) or trainer.get(24, 0):
        raise ValueError("a SentencePiece model with unescaped or suffixed spaces has no equivalent")
    model = _unigram(pieces) if kind == _UNIGRAM else _bpe(pieces)
    whole = [(text, number) for number, (text, _, sort) in enumerate(pieces) if sort == _USER_DEFINED]
    definition = definition_of(model, whole, **_surroundings(normalizer))
    control = [(text, number) for number, (text, _, sort) in enumerate(pieces) if sort in (_CONTROL, _UNKNOWN)]
    for entry in definition["added_tokens"]:
        entry["special"] = False
    definition["added_tokens"] += definition_of(model, control)["added_tokens"]
    definition["added_tokens"].sort(key=lambda entry: entry["id"])
    return definition, _roles(trainer, dict(control))


def _roles(trainer: dict[int, Field], known: dict[str, int]) -> dict[str, str]:
    roles = {}
    for role, number, default in (
        ("unk_token", 45, "<unk>"),
        ("bos_token", 46, "<s>"),
        ("eos_token", 47, "</s>"),
        ("pad_token", 48, "<pad>"),
    ):
        text = _text(trainer.get(number, default.encode()))
        if text in known:
            roles[role] = text
    return roles


def _surroundings(spec: dict[int, Field]) -> dict[str, Any]:
    """Normalizer and decoder of the model's normalizer spec."""
    steps: list[dict[str, Any]] = []
    charsmap = spec.get(2, b"")
    if isinstance(charsmap, bytes) and charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode("ascii")})
    if spec.get(4, 1):  # remove_extra_whitespaces
        # only U+0020, not every white space; \\A and \\z because ^ and $ mean lines here
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    prefix = bool(spec.get(3, 1))
    if prefix:  # add_dummy_prefix
        steps.append({"type": "Prepend", "prepend": SPACE})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


def _unigram(pieces: list[tuple[str, float, int]]) -> dict[str, Any]:
    kinds = [sort for _, _, sort in pieces]
    lowest = min(score for _, score, sort in pieces if sort == _NORMAL) if _NORMAL in kinds else 0.0
    vocab: list[list[Any]] = []
    for text, score, sort in pieces:
        # pieces that the C++ library never produces from text must never win here either
        vocab.append([text, score if sort in (_NORMAL, _USER_DEFINED) else min(score, lowest) - 1000.0])
    unknown = kinds.index(_UNKNOWN) if _UNKNOWN in kinds else None
    return {"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": _BYTE in kinds}


def _bpe(pieces: list[tuple[str, float, int]]) -> dict[str, Any]:
    vocab = {text: number for number, (text, _, _) in enumerate(pieces)}
    usable = {text for text, _, sort in pieces if sort in (_NORMAL, _USER_DEFINED)}
    merges = []
    for text, score, sort in pieces:
        if sort != _NORMAL:
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in usable and right in usable:
                merges.append((-score, vocab[text], left, right))
    merges.sort(key=lambda merge: merge[:2])  # SentencePiece merges the best score first
    unknown = next((text for text, _, sort in pieces if sort == _UNKNOWN), None)
    fallback = any(sort == _BYTE for _, _, sort in pieces)
    return bpe_model(
        vocab, [[left, right] for _, _, left, right in merges], unk_token=unknown, fuse_unk=True, byte_fallback=fallback
    )
