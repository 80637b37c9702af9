"""Documents cut into passages: the units that are looked up and put before a prompt.

Passages of 100 words that do not overlap are those of Karpukhin et al. 2020 (Dense Passage Retrieval), section 4.1.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlm_cli.data.chunks import Chunker
from mlm_cli.data.parse import parse_segment
from mlm_cli.data.segment import drop_spool
from mlm_cli.data.sources import Source
from mlm_cli.data.words import UNSPACED
from mlm_cli.errors import DataError

# A word is a run without white space; where words are not spaced, as in Chinese and Thai, each character is one.
_ALONE = "".join(f"{chr(low)}-{chr(high - 1)}" for low, high in (*UNSPACED, (0x20000, 0x40000)))
_WORD = re.compile(rf"(?!\s)[{_ALONE}]|[^\s{_ALONE}]+")


@dataclass(frozen=True)
class Document:
    """A text of the knowledge base. ``line`` of ``path``, from 1, is where it begins; ``has_lines``: it has more."""

    text: str
    path: str
    line: int
    has_lines: bool = False


@dataclass(frozen=True)
class Passage:
    """A piece of a document.

    Attributes:
        path: file of the document; ``line``: where the passage begins in it, in JSON lines the line of the document.
        offset: characters of the document's text before the passage.
    """

    text: str
    path: str
    line: int
    offset: int


@dataclass(frozen=True)
class Retrieved:
    """What was found for a prompt: ``passages`` with their scores, best first, and how many more had no room."""

    passages: tuple[tuple[Passage, float], ...]
    num_dropped: int = 0

    def record(self) -> dict[str, Any]:
        """Fields of the answer's line of JSON."""
        passages = [
            {"source": f"{one.path}:{one.line}", "offset": one.offset, "score": round(score, 6), "text": one.text}
            for one, score in self.passages
        ]
        return {"passages": passages, "num_passages_dropped": self.num_dropped}


def cut(text: str, words: int, overlap: int = 0) -> list[tuple[int, int]]:
    """``(start, stop)`` in characters of the passages of a text: ``words`` words each, the last one perhaps fewer.

    Each passage begins ``words - overlap`` words behind the one before; there is none that adds no word.
    """
    spans = [found.span() for found in _WORD.finditer(text)]
    step = words - overlap
    starts = range(0, max(len(spans) - overlap, 1), step) if spans else ()
    return [(spans[start][0], spans[min(start + words, len(spans)) - 1][1]) for start in starts]


def read_documents(sources: Sequence[Source], key: str) -> Iterator[Document]:
    """Texts of files, read as by `mlm preprocess`: a line each of ``.jsonl``, a row of ``.parquet``, a whole ``.txt``.

    Raises:
        DataError: a file that cannot be read, a malformed line, naming file and line.
    """
    with tempfile.TemporaryDirectory(prefix="mlm-documents-") as scratch:
        chunker = Chunker((key,), "file", Path(scratch))
        for number, source in enumerate(sources):
            done = 0  # lines of the segments before
            for segment in chunker.segments(number, source):
                parsed = parse_segment(segment, (key,), chunker.max_line)
                drop_spool(segment)
                if parsed.bad:
                    line, reason = parsed.bad[0]
                    raise DataError(f"{source.path}:{done + max(line, 1)}: {reason}")
                for line, text in zip(parsed.numbers, parsed.documents[key], strict=True):
                    joined = text if isinstance(text, str) else " ".join(text)
                    yield Document(joined, source.path, done + line, has_lines=segment.mode == "whole")
                done += parsed.lines


class Passages:
    """All passages of a knowledge base, in a few arrays that can be mapped from a file.

    Attributes:
        files: names of the files.
        text: uint8, the passages' UTF-8 back to back.
        ends: int64 [passages], where each ends in it.
        places: int64 [passages, 3]: number of the file, line, offset.
    """

    ARRAYS = ("text", "ends", "places")

    def __init__(self, files: Sequence[str], text: np.ndarray, ends: np.ndarray, places: np.ndarray) -> None:
        self.files, self.text, self.ends, self.places = list(files), text, ends, places
        if not (
            (text.dtype, ends.dtype, places.dtype) == (np.uint8, np.int64, np.int64)
            and (text.ndim, ends.ndim, places.shape) == (1, 1, (len(ends), 3))
            and len(ends) > 0
            and ends[-1] == len(text)
        ):
            raise ValueError("these arrays hold no passages")

    @classmethod
    def of(cls, documents: Iterable[Document], words: int, overlap: int) -> Passages:
        """Cut documents. Raises DataError: not a word in them."""
        files: dict[str, int] = {}
        pieces, ends, places, size = list[bytes](), list[int](), list[tuple[int, int, int]](), 0
        for document in documents:
            file = files.setdefault(document.path, len(files))
            line, counted = document.line, 0
            for start, stop in cut(document.text, words, overlap):
                if document.has_lines:
                    line += document.text.count("\n", counted, start)
                    counted = start
                pieces.append(document.text[start:stop].encode("utf-8"))
                size += len(pieces[-1])
                ends.append(size)
                places.append((file, line, start))
        if not pieces:
            raise DataError("the documents of the knowledge base hold no text", hint="check `retrieval.documents`")
        text = np.frombuffer(b"".join(pieces), dtype=np.uint8)
        return cls(list(files), text, np.array(ends, np.int64), np.array(places, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> Passage:
        start = int(self.ends[number - 1]) if number else 0
        file, line, offset = map(int, self.places[number])
        text = self.text[start : int(self.ends[number])].tobytes().decode("utf-8", "replace")
        return Passage(text, self.files[file], line, offset)

    def texts(self) -> Iterator[str]:
        """The text of each, in order."""
        start = 0
        for end in self.ends.tolist():
            yield self.text[start:end].tobytes().decode()
            start = end
