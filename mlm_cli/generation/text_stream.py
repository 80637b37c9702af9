"""Tokens to text, one at a time, without ever showing half a character."""

from __future__ import annotations

import codecs

from mlm_cli.data.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"


class TextStream:
    """Pieces of text of a growing list of ids; joined, they are the text of the whole list without special tokens."""

    def feed(self, token: int) -> str:
        """Take one id, return the text that became certain."""
        raise NotImplementedError

    def flush(self) -> str:
        """The text of what was held back, broken characters as U+FFFD."""
        raise NotImplementedError


class ByteStream(TextStream):
    """For tokenizers whose tokens are plain bytes (byte-level BPE): an incremental UTF-8 decoder is exact."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        if token in self._tokenizer.special_ids:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token) or b"")

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowStream(TextStream):
    """For tokenizers whose text depends on the left neighbours (leading blanks, WordPiece ``##``, byte fallback).

    Each piece is the difference between the text of a short window of ids with and without the new ones. While the text
    ends in a replacement character the last character may still be growing, and the ids wait.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []

    def feed(self, token: int) -> str:
        self._pending.append(token)
        before, now = self._texts()
        if now.endswith(_REPLACEMENT) or len(now) <= len(before):
            return ""
        return self._emit(before, now)

    def flush(self) -> str:
        return self._emit(*self._texts()) if self._pending else ""

    def _texts(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        before = decode(self._context, skip_special=True) if self._context else ""
        return before, decode(self._context + self._pending, skip_special=True)

    def _emit(self, before: str, now: str) -> str:
        self._context, self._pending = self._pending, []
        return now[len(before) :]


def text_stream(tokenizer: Tokenizer) -> TextStream:
    """The kind of stream that is exact for this tokenizer."""
    return ByteStream(tokenizer) if tokenizer.kind == "byte-level BPE" else WindowStream(tokenizer)
