"""n-grams of test sets, and whether a document holds one of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlm_cli.data.compressed import PACKED, open_unpacked
from mlm_cli.data.ngrams import Numbers, ngram_numbers, word_numbers, words_of
from mlm_cli.errors import DataError


@dataclass(frozen=True)
class TestTexts:
    """What not to train on. ``ngrams``: sorted numbers; ``files``: for each, which of ``paths`` it is from first.

    ``hashes``: sha256 of each file as stored. ``short``: texts of fewer than n words, which cannot be found.
    """

    n: int
    paths: tuple[str, ...]
    hashes: tuple[str, ...]
    ngrams: Numbers
    files: npt.NDArray[np.uint32]
    short: int

    def overlap(self, words: Sequence[str], numbers: Numbers) -> tuple[str, str] | None:
        """(the first n-gram shared, its test file) of a document's words and their numbers; None if there is none."""
        ngrams = ngram_numbers(numbers, self.n)
        places = np.minimum(np.searchsorted(self.ngrams, ngrams), len(self.ngrams) - 1)
        hits = np.flatnonzero(self.ngrams[places] == ngrams)
        if not len(hits):
            return None
        first = int(hits[0])
        return " ".join(words[first : first + self.n]), self.paths[self.files[places[first]]]


def read_test_texts(paths: Sequence[str], n: int) -> TestTexts:
    """Read test files: every text inside JSON and JSON lines, whatever its key; other files as one text each.

    Raises:
        DataError: a file that is missing or cannot be read, or none with as many as n words.
    """
    hashes: list[str] = []
    pieces: list[Numbers] = []
    short = 0
    for path in paths:
        content, digest = _content(path)
        hashes.append(digest)
        found: list[Numbers] = []
        for text in _texts(path, content):
            numbers = ngram_numbers(word_numbers(words_of(text)), n)
            short += not len(numbers)
            found.append(numbers)
        pieces.append(np.concatenate([*found, np.zeros(0, np.uint64)]))
    together = np.concatenate(pieces)
    if not len(together):
        raise DataError(
            f"no text of `{paths[0]}`{' and the other test files' if len(paths) > 1 else ''} has {n} words",
            hint="`preprocess.clean.decontaminate_ngram=N` looks for shorter runs of words",
        )
    ngrams, first = np.unique(together, return_index=True)
    origin = np.repeat(np.arange(len(paths), dtype=np.uint32), [len(piece) for piece in pieces])
    return TestTexts(n, tuple(paths), tuple(hashes), ngrams, origin[first], short)


def _content(path: str) -> tuple[str, str]:
    """(unpacked text, sha256 of the file as stored)."""
    try:
        with open_unpacked(Path(path)) as stream:
            content = stream.read().decode("utf-8-sig")
        with Path(path).open("rb") as stored:
            return content, hashlib.file_digest(stored, "sha256").hexdigest()
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 text (byte {error.start})"
    except (OSError, EOFError) as error:
        reason = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    raise DataError(
        f"test file `{path}` {reason}", hint="`preprocess.clean.decontaminate` takes JSON, JSON lines and text"
    )


def _texts(path: str, content: str) -> Iterator[str]:
    suffixes = [suffix for suffix in Path(path).suffixes if suffix not in PACKED]
    if not suffixes or suffixes[-1] not in (".json", ".jsonl", ".ndjson"):
        yield content
        return
    try:  # one value over several lines, as SQuAD's
        yield from _strings(json.loads(content))
        return
    except ValueError:
        pass
    for number, line in enumerate(content.split("\n"), 1):
        if not line or line.isspace():
            continue
        try:
            yield from _strings(json.loads(line))
        except ValueError as error:
            raise DataError(f"test file {path}:{number}: malformed JSON: {error}") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
