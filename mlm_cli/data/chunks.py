"""Inputs -> segments: runs of whole lines (or one whole document, or a table) that a worker can read by itself.

Every stored byte is read once here and hashed on the way; nothing is parsed. Plain files are cut at line ends and never
copied. What cannot be read from the middle (compressed files, standard input, tables, Hub data sets) is unpacked into
small spool files, each deleted when its segment is done, so that memory and disk stay flat.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlm_cli.data.hub_text import hub_segments
from mlm_cli.data.parquet_text import parquet_segments
from mlm_cli.data.segment import BLOCK, Segment, Spool, open_source
from mlm_cli.data.sources import Source
from mlm_cli.errors import DataError


class Chunker:
    """Cuts sources into segments of about ``chunk_bytes``.

    Args:
        text_documents: `file` (a .txt file is one document) or `line`.
        keys: columns read from tables.
        spool: folder for unpacked pieces; max_line: longest line or text file, in bytes.

    Raises (while iterating):
        DataError: a file that cannot be read or unpacked.
    """

    def __init__(
        self,
        keys: tuple[str, ...],
        text_documents: str,
        spool: Path,
        *,
        chunk_bytes: int = 2 << 20,
        max_line: int = 32 << 20,
    ) -> None:
        self.keys, self.text_documents, self.spool = keys, text_documents, Spool(spool)
        self.chunk_bytes, self.max_line = chunk_bytes, max_line

    def segments(self, number: int, source: Source, start: int = 0) -> Iterator[Segment]:
        """Segments of one source, from position ``start`` (a segment's ``resume``) on."""
        try:
            if source.format == "hub":
                yield from hub_segments(number, source, start, self.keys, self.spool, self.chunk_bytes)
            elif source.format == "parquet":
                yield from parquet_segments(number, source, start, self.keys, self.spool, self.chunk_bytes)
            elif source.format == "txt" and self.text_documents == "file":
                yield from self._whole(number, source, start)
            else:
                yield from self._lines(number, source, start)
        except (EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk or the file system, not what the file holds
            raise DataError(f"`{source.path}` is cut short or damaged: {error}") from error

    def _whole(self, number: int, source: Source, start: int) -> Iterator[Segment]:
        """A file that is one document."""
        if start:
            return  # it was done
        raw, stream = open_source(source)
        size, spooled, path = source.size, False, source.path
        if source.packed or source.is_stream:
            content = read_up_to(stream, self.max_line + 1)
            size, spooled = len(content), True
            path = str(self.spool.next_path())
            Path(path).write_bytes(content)
        mode = "empty" if size == 0 else "long" if size > self.max_line else "whole"
        digest = raw.finish()
        yield Segment(number, mode, path, 0, size, 1, raw.position, True, True, digest, spooled)

    def _lines(self, number: int, source: Source, start: int) -> Iterator[Segment]:
        """Runs of lines."""
        mode = "lines" if source.format == "txt" else "jsonl"
        raw, stream = open_source(source)
        spooled = bool(source.packed or source.is_stream)
        template = Segment(number, mode, source.path, 0, 0, 0, 0)
        position = 0  # in the unpacked source
        pending: Segment | None = None
        for begin, stop, sort, pieces in self._runs(stream, start, keep=spooled):
            position = stop
            if pending is not None:
                yield pending
            pending = replace(
                template, mode=mode if sort == "run" else sort, start=begin, stop=stop, resume=stop, first=begin == 0
            )
            if spooled:
                path = self.spool.next_path()
                with path.open("wb") as out:
                    out.writelines(pieces)
                pending = replace(
                    pending, path=str(path), start=0, stop=stop - begin if sort == "run" else 0, spooled=True
                )
            pending = replace(pending, consumed=raw.position)
        digest = raw.finish()
        if pending is None:
            pending = replace(
                template, mode="end" if start else "empty", start=start, stop=start, first=True, resume=position
            )
        yield replace(pending, last=True, sha256=digest, consumed=raw.position)

    def _runs(self, stream: Any, start: int, *, keep: bool) -> Iterator[tuple[int, int, str, list[bytes]]]:
        """(start, stop, `run` or `long`, bytes if kept) of runs of whole lines; the last line may lack its end."""
        begin = position = start  # of the run being gathered; of the next byte to read
        skip_to(stream, start)
        line_start = start
        pieces: list[bytes] = []
        too_long = False
        while block := stream.read(min(BLOCK, self.chunk_bytes)):
            cut = block.rfind(b"\n") + 1
            first_end = block.find(b"\n") + 1
            length = (first_end - 1 if first_end else len(block)) + position - line_start
            if length > self.max_line and not too_long:
                if line_start > begin:
                    yield begin, line_start, "run", _head(pieces, line_start - begin)
                too_long, begin, pieces = True, line_start, []
            if too_long:
                if not first_end:
                    position += len(block)
                    continue
                yield begin, position + first_end, "long", []
                too_long, begin = False, position + first_end
                block_rest = block[first_end:]
            else:
                block_rest = block
            if keep:
                pieces.append(block_rest)
            if cut:
                line_start = position + cut
            position += len(block)
            if line_start - begin >= self.chunk_bytes:
                if keep:
                    joined = b"".join(pieces)
                    pieces = [joined[line_start - begin :]]
                    yield begin, line_start, "run", [joined[: line_start - begin]]
                else:
                    yield begin, line_start, "run", []
                begin = line_start
        if position > begin:
            yield begin, position, "long" if too_long else "run", pieces


def _head(pieces: list[bytes], size: int) -> list[bytes]:
    return [b"".join(pieces)[:size]] if pieces else []


def read_up_to(stream: Any, size: int) -> bytes:
    """Up to ``size`` bytes; less only at the end (a decompressor may give less at a time)."""
    pieces = []
    while size > 0 and (block := stream.read(min(size, BLOCK))):
        pieces.append(block)
        size -= len(block)
    return b"".join(pieces)


def skip_to(stream: Any, position: int) -> None:
    """Read and drop the first ``position`` bytes (so that they are hashed all the same)."""
    while position > 0 and (block := stream.read(min(position, BLOCK))):
        position -= len(block)
