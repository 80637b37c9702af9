"""Pieces of a ``tokenizer.json``, as the `tokenizers` library reads it."""

from __future__ import annotations

from typing import Any

END_OF_TEXT = "<|endoftext|>"


def added_token(token: str, number: int) -> dict[str, Any]:
    """The entry of a special token in ``added_tokens``."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **flags, "special": True}


def definition_of(model: dict[str, Any], special: list[tuple[str, int]], **parts: Any) -> dict[str, Any]:
    """A ``tokenizer.json`` around ``model``; ``parts``: normalizer, pre_tokenizer, post_processor, decoder."""
    order = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(token, number) for token, number in special],
        **{name: parts.get(name) for name in order},
        "model": model,
    }


def byte_level(*, use_regex: bool = True) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def bpe_model(vocab: dict[str, int], merges: list[list[str]], **changes: Any) -> dict[str, Any]:
    """A BPE model section with GPT-2's settings, ``changes`` applied."""
    none = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    flags = dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    return {"type": "BPE", **none, **flags, **changes, "vocab": vocab, "merges": merges}


def bert_normalizer(*, lowercase: bool) -> dict[str, Any]:
    return {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": lowercase,
    }


def bert_template(vocab: dict[str, int]) -> dict[str, Any] | None:
    """``[CLS] A [SEP]`` and ``[CLS] A [SEP] B [SEP]``, where the vocabulary has both."""
    if "[CLS]" not in vocab or "[SEP]" not in vocab:
        return None
    return {"type": "BertProcessing", "sep": ["[SEP]", vocab["[SEP]"]], "cls": ["[CLS]", vocab["[CLS]"]]}


def end_template(token: str, number: int) -> dict[str, Any]:
    """``A END`` and ``A END B END``, as T5 ends texts."""
    end = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [first, end],
        "pair": [first, end, second, end],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2's ``bytes_to_unicode``)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in plain}
    for extra, byte in enumerate(byte for byte in range(256) if byte not in table):
        table[byte] = chr(256 + extra)
    return [table[byte] for byte in range(256)]


def bytes_definition() -> dict[str, Any]:
    """The `bytes` tokenizer: id = byte, 256 ends a document. A byte-level BPE without merges, so any tool opens it."""
    vocab = {character: byte for byte, character in enumerate(byte_characters())}
    return definition_of(
        bpe_model(vocab, []),
        [(END_OF_TEXT, 256)],
        pre_tokenizer=byte_level(use_regex=False),
        decoder=byte_level(use_regex=False),
    )
