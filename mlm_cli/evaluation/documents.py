"""Held-out text -> documents ready for scoring: token ids, and how many words and bytes they stand for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from mlm_cli.data.compressed import PACKED, open_unpacked
from mlm_cli.data.indexed import IndexedDataset, resolve_prefix
from mlm_cli.data.sidecar import load_sidecar
from mlm_cli.data.sources import text_format
from mlm_cli.data.tokenizer import Tokenizer
from mlm_cli.errors import DataError

_MORE_TEXT = (".raw", ".md")  # beside what `mlm preprocess` reads
_TOGETHER = 64  # documents given to the tokenizer at once


@dataclass(frozen=True)
class Document:
    """One text to be scored. ``words`` and ``bytes`` are None where the ids cannot be turned back into text."""

    ids: np.ndarray
    words: int | None
    bytes: int | None


def count_words(text: str) -> int:
    """Words as white space separates them: the unit of published word-level perplexities."""
    return len(text.split())


def open_documents(
    paths: Sequence[str], tokenizer: Tokenizer | None, *, key: str = "text", limit: int | None = None
) -> list[Document]:
    """Read and tokenise everything that ``paths`` name, in that order.

    Args:
        paths: prefixes of indexed data sets; ``.jsonl``, ``.json`` (a document a line); folders (their text files,
            sorted); any other file is one document of plain text. Each also ``.gz`` or ``.zst``.
        tokenizer: may be None only for indexed data sets.
        key: of the text in JSON lines.
        limit: the first so many documents only.

    Raises:
        DataError: nothing there, not UTF-8, malformed JSON, data of another tokenizer, no text at all.
    """
    documents = list(islice(_all_documents(paths, tokenizer, key), limit))
    if not any(len(document.ids) for document in documents):
        raise DataError(f"no text to score in {', '.join(paths)}")
    return documents


def _all_documents(paths: Sequence[str], tokenizer: Tokenizer | None, key: str) -> Iterator[Document]:
    for path in paths:
        if (prefix := _indexed_prefix(path)) is not None:
            yield from _indexed_documents(prefix, tokenizer)
            continue
        if tokenizer is None:
            raise DataError("text cannot be scored without a tokenizer", hint="name one with --tokenizer")
        texts = (text for file in files_of(Path(path)) for text in read_texts(file, key))
        while group := list(islice(texts, _TOGETHER)):
            for text, ids in zip(group, tokenizer.encode_batch(group), strict=True):
                yield Document(np.asarray(ids, dtype=np.int64), count_words(text), len(text.encode("utf-8")))


def _indexed_prefix(path: str) -> str | None:
    if Path(path).exists() and not path.endswith((".bin", ".idx")):
        return None
    try:
        return resolve_prefix(path)
    except DataError as error:
        if _is_text(Path(path)) or Path(path).suffix in PACKED:
            raise DataError(f"no file {path}") from None
        raise DataError(f"{path} is neither a file, a folder nor an indexed data set", hint=error.hint) from None


def _indexed_documents(prefix: str, tokenizer: Tokenizer | None) -> Iterator[Document]:
    """Documents of a ``.bin/.idx`` pair, without the end-of-document id that preprocessing may have appended."""
    dataset = IndexedDataset(prefix)
    sidecar = load_sidecar(prefix)
    if sidecar is not None and tokenizer is not None and sidecar.tokenizer_fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"{prefix} was made with another tokenizer ({sidecar.tokenizer_spec}) than the model's",
            hint="score the text files themselves, or run `mlm preprocess` with the model's tokenizer",
        )
    eod = tokenizer.eod_id if tokenizer is not None else sidecar.eod_id if sidecar is not None else None
    for number in range(dataset.num_documents):
        ids = dataset.document(number).astype(np.int64)
        if eod is not None and len(ids) and ids[-1] == eod:
            ids = ids[:-1]
        yield Document(ids, *_words_and_bytes(ids, tokenizer))


def _words_and_bytes(ids: np.ndarray, tokenizer: Tokenizer | None) -> tuple[int | None, int | None]:
    if tokenizer is None:
        return None, None
    try:
        content = tokenizer.decode_bytes(ids.tolist())
    except DataError:  # tokens that are no pieces of bytes: decoded as well as this tokenizer can
        content = tokenizer.decode(ids.tolist()).encode("utf-8")
    return count_words(content.decode("utf-8", errors="replace")), len(content)


def files_of(path: Path) -> list[Path]:
    """A file itself, or the text files of a folder, sorted. Raises DataError: a folder without any."""
    if not path.is_dir():
        return [path]
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and _is_text(file)]
    if not files:
        hint = f"looked for .txt, .jsonl, .json, {', '.join(_MORE_TEXT)}, also .gz and .zst"
        raise DataError(f"no text files in {path}", hint=hint)
    return files


def _format(path: Path) -> str | None:
    """As for `mlm preprocess`; what that does not know is plain text here."""
    known = text_format(path.name)
    return known[0] if known else None


def _is_text(path: Path) -> bool:
    stem = path.stem if path.suffix in PACKED else path.name
    return _format(path) in ("jsonl", "txt") or Path(stem).suffix in _MORE_TEXT


def read_texts(path: Path, key: str = "text") -> Iterator[str]:
    """The texts of one file; see ``located_texts``."""
    return (text for _, text in located_texts(path, key))


def located_texts(path: Path, key: str = "text") -> Iterator[tuple[str, str]]:
    """Where it stands, and each text of a file: a line each of ``.jsonl``, else the whole file.

    Raises:
        DataError: naming file and line.
    """
    if _format(path) == "parquet":
        raise DataError(f"{path}: tables are not scored as they are", hint="score what `mlm preprocess` makes of it")
    try:
        with open_unpacked(path) as file:
            if _format(path) != "jsonl":
                yield str(path), _decode(file.read(), str(path))
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, _text_of_line(line.rstrip(b"\r\n"), where, key)
    except EOFError as error:
        raise DataError(f"{path} cannot be read, it is cut short or damaged: {error}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def _text_of_line(line: bytes, where: str, key: str) -> str:
    try:
        record = json.loads(_decode(line, where))
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
    text = record.get(key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DataError(f"{where} has no text under the key `{key}`")
    return text


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8: byte {content[error.start]:#04x} at {error.start}") from None
