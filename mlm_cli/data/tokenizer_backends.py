"""Encoders: the fast ways to turn many texts into ids, each proven equal to the ``tokenizers`` library before use.

``gigatoken`` (extra `fast`) is tens of times faster for BPE; it is used only where a check sample gives the same ids.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mlm_cli.data.tokenizer import Tokenizer
from mlm_cli.data.tokenizer_pieces import END_OF_TEXT, bytes_definition
from mlm_cli.errors import DataError

Ids = npt.NDArray[Any]
BACKENDS = ("auto", "gigatoken", "tokenizers")

# What tokenizers most often disagree on: spaces, digits, contractions, marks, scripts without spaces, emoji, controls.
CHECK_SAMPLE = (
    "Hello world! It's we'll I'VE they'd 'tis  two  spaces   three\ttab\t\ttabs \n\n newline\r\nCRLF \r alone ",
    "   leading and trailing   ",
    "\n\n\n    def f(x):\n\t\treturn x ** 2  # comment\n\n",
    "1 12 123 1234 12345 3.14159 1,000,000 1e-5 0x1F 2026-01-31 ½ ² ٣٤ 五",
    "naïve café Ünïcödé e\u0301 n\u0303 \u00a0nbsp\u2003em\u200bzero\u200d\u2028line\u2029para\u0085next\ufeffbom",
    "Καλημέρα κόσμε. Привет, мир! שלום עולם. مرحبا بالعالم، كيف الحال؟ नमस्ते दुनिया। สวัสดีชาวโลก",
    "你好，世界。吾輩は猫である。名前はまだ無い。안녕하세요 세계 𠮷野家 ΑΒΓ ǅ ﬁ ß İı",
    "😀 👩‍👩‍👧‍👦 🇩🇪 ☃️ 👍🏽 ∑∫√∞ → “quotes” ‘single’ — – … ¿¡",
    "\x00\x01\x1b[0m\x7f \x80 \xad \ufffd \ue000 \U000e0001 \U0010ffff",
    "a" * 300 + " " * 70 + "ab" * 100 + "!?" * 40 + "\n" * 30,
    'https://example.org/a_b-c?q=1&r=%20#frag <p class="x">html</p> {"json": [1, null, true]} C:\\dir\\file.txt',
    "camelCase snake_case SCREAMING_CASE kebab-case don't DON'T o'clock rock'n'roll 'S 'sS",
    "",
    " ",
    "\n",
)


class Encoder(Protocol):
    """Turns texts into ids. ``name`` is what users see."""

    name: str

    def encode(self, texts: Sequence[str], dtype: npt.DTypeLike) -> list[Ids]:
        """Ids of each text as a one-dimensional array of ``dtype``; no special tokens are added."""
        ...

    def encode_flat(self, texts: Sequence[str], dtype: npt.DTypeLike, end: int | None) -> tuple[Ids, Ids]:
        """(ids of all texts back to back, where each text ends in them); ``end`` closes each text that has ids."""
        ...


def _flat(arrays: list[Ids], dtype: npt.DTypeLike, end: int | None) -> tuple[Ids, Ids]:
    sizes = np.fromiter((array.shape[0] for array in arrays), np.int64, len(arrays))
    if end is not None:
        sizes[sizes > 0] += 1
        close = np.array([end], dtype)
        arrays = [piece for array in arrays if array.shape[0] for piece in (array, close)]
    return (np.concatenate(arrays) if arrays else np.zeros(0, dtype)), np.cumsum(sizes)


class BytesEncoder:
    """The `bytes` tokenizer: the text's UTF-8 is its ids."""

    name = "bytes"

    def encode(self, texts: Sequence[str], dtype: npt.DTypeLike) -> list[Ids]:
        return [self._one(text, dtype) for text in texts]

    def encode_flat(self, texts: Sequence[str], dtype: npt.DTypeLike, end: int | None) -> tuple[Ids, Ids]:
        return _flat(self.encode(texts, dtype), dtype, end)

    def _one(self, text: str, dtype: npt.DTypeLike) -> Ids:
        if END_OF_TEXT not in text:
            return np.frombuffer(text.encode("utf-8"), np.uint8).astype(dtype)
        end = np.array([256], dtype)
        parts: list[Ids] = []
        for piece in text.split(END_OF_TEXT):
            parts += [np.frombuffer(piece.encode("utf-8"), np.uint8).astype(dtype), end]
        return np.concatenate(parts[:-1])


class ReferenceEncoder:
    """The ``tokenizers`` library."""

    name = "tokenizers"

    def __init__(self, tokenizer: Tokenizer) -> None:
        # processes, not threads, share the work: threads of forked processes would fight over the cores
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._tokenizer = tokenizer.reference

    def encode(self, texts: Sequence[str], dtype: npt.DTypeLike) -> list[Ids]:
        found: list[Ids] = []
        for start in range(0, len(texts), 64):  # a few at a time: encodings take far more memory than their ids
            batch = self._tokenizer.encode_batch_fast(list(texts[start : start + 64]), add_special_tokens=False)
            found += [np.array(encoding.ids, dtype) for encoding in batch]
        return found

    def encode_flat(self, texts: Sequence[str], dtype: npt.DTypeLike, end: int | None) -> tuple[Ids, Ids]:
        return _flat(self.encode(texts, dtype), dtype, end)


class GigatokenEncoder:
    """gigatoken: BPE with a cache of words, a few hundred MB/s a core."""

    name = "gigatoken"

    def __init__(self, definition_json: str) -> None:
        from gigatoken.gigatoken_rs import load_hf_json

        self._encode = load_hf_json(definition_json).encode

    def encode(self, texts: Sequence[str], dtype: npt.DTypeLike) -> list[Ids]:
        # text by text, and the result copied at once: what `encode` returns holds on to far more memory than its ids
        encode = self._encode
        return [encode(text).astype(dtype) for text in texts]

    def encode_flat(self, texts: Sequence[str], dtype: npt.DTypeLike, end: int | None) -> tuple[Ids, Ids]:
        # straight into one array: some 10 % of the whole time against joining arrays afterwards
        encode = self._encode
        out = np.empty(sum(map(len, texts)) // 3 + 2 * len(texts) + 16, dtype)
        ends: list[int] = []
        at, room = 0, out.shape[0]
        for text in texts:
            ids = encode(text)
            stop = at + ids.size
            if stop >= room:
                room = 2 * stop + 16
                out = np.concatenate([out[:at], np.empty(room - at, dtype)])
            if stop > at:
                out[at:stop] = ids
                at = stop
                if end is not None:
                    out[at] = end
                    at += 1
            ends.append(at)
        return out[:at], np.array(ends, np.int64)


@dataclass(frozen=True)
class Choice:
    """An encoder and why it was chosen. ``proven`` is False while its check sample has still to be run."""

    encoder: Encoder
    reason: str
    proven: bool


def choose_encoder(tokenizer: Tokenizer, backend: str = "auto") -> Choice:
    """The fastest encoder that can take this tokenizer.

    Args:
        backend: `auto`, or the one to use.

    Raises:
        DataError: the backend asked for cannot be used, with the reason.
    """
    if is_bytes(tokenizer) and backend == "auto":
        return Choice(BytesEncoder(), "ids are the bytes themselves", True)
    if backend == "tokenizers":
        return Choice(ReferenceEncoder(tokenizer), "asked for", True)
    reason = _why_not_gigatoken(tokenizer)
    if reason is None:
        try:
            fast = GigatokenEncoder(tokenizer.definition_json)
            return Choice(fast, "gives the same ids as tokenizers on a check sample", False)
        except Exception as error:  # the library raises whatever its Rust side says
            reason = f"gigatoken cannot take this tokenizer: {str(error).splitlines()[0]}"
    if backend == "gigatoken":
        raise DataError(f"backend `gigatoken` cannot be used: {reason}", hint="leave --backend at `auto`")
    return Choice(ReferenceEncoder(tokenizer), reason, True)


def is_bytes(tokenizer: Tokenizer) -> bool:
    """True when a tokenizer's ids are bytes, whatever file it came from."""
    if tokenizer.vocab_size != 257 or tokenizer.definition["model"].get("merges"):
        return False
    from mlm_cli.data.tokenizer import fingerprint

    return tokenizer.fingerprint == fingerprint(bytes_definition())


def _why_not_gigatoken(tokenizer: Tokenizer) -> str | None:
    if tokenizer.definition["model"]["type"] != "BPE":
        return f"gigatoken does BPE only, this is {tokenizer.definition['model']['type']}"
    try:
        import gigatoken.gigatoken_rs  # noqa: F401
    except ImportError:
        return "gigatoken is not installed (`pip install 'mlm-cli[fast]'` makes BPE many times faster)"
    return None


def disagreement(encoder: Encoder, tokenizer: Tokenizer, texts: Sequence[str] = ()) -> str | None:
    """First difference between ``encoder`` and the reference on the check sample and ``texts``; None if there is none.

    Texts that spell added tokens are part of the sample: backends treat those differently more often than words.
    """
    added = [entry["content"] for entry in tokenizer.definition.get("added_tokens") or []][:32]
    sample = [*CHECK_SAMPLE, *(f"before{token}after {token} {token}" for token in added), *texts]
    wanted = tokenizer.encode_batch(sample)
    try:
        found = encoder.encode(sample, np.int64)
    except Exception as error:
        return f"it failed: {error}"
    for text, ours, theirs in zip(sample, found, wanted, strict=True):
        if ours.tolist() != theirs:
            return f"other ids for {text[:40]!r}"
    return None
