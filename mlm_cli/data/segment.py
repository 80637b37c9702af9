"""A segment: a piece of one source that a worker reads by itself, in place or from a spool file."""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mlm_cli.data.compressed import unpacked
from mlm_cli.data.sources import Source
from mlm_cli.errors import DataError

BLOCK = 1 << 20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Segment:
    """A piece of one source.

    ``path`` with ``start:stop`` in bytes is where a worker reads it. ``mode``: `jsonl`, `lines`, `whole` (one
    document), `arrow` (a table; rows from 1), `end` (nothing is left), or what is wrong with it: `long` (a line over
    the limit), `empty` (a file without a byte). ``resume`` is the position behind it in the unpacked source (bytes, or
    rows of a table); ``consumed`` stored bytes read so far; ``last`` marks the end of its source, whose ``sha256`` then
    is known.
    """

    source: int
    mode: str
    path: str
    start: int
    stop: int
    resume: int
    consumed: int
    first: bool = False
    last: bool = False
    sha256: str | None = None
    spooled: bool = False


class HashingFile:
    """A binary file whose bytes are hashed as they are read in order."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._hash, self.position = raw, hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        block = self._raw.read(size)
        self._hash.update(block)
        self.position += len(block)
        return block

    def finish(self) -> str:
        """Hash what is left unread, and close."""
        while self.read(BLOCK):
            pass
        self._raw.close()
        return self._hash.hexdigest()

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()


def open_source(source: Source) -> tuple[HashingFile, Any]:
    """(stored bytes, unpacked bytes) of a source."""
    raw = HashingFile(sys.stdin.buffer if source.path == "-" else Path(source.path).open("rb"))  # noqa: SIM115
    return raw, unpacked(raw, source.packed, source.path)


class Spool:
    """The folder of unpacked pieces, each under a name of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._count = folder, 0

    def next_path(self) -> Path:
        self._count += 1
        return self.folder / f"{self._count:08d}"


def read_segment(segment: Segment) -> bytes:
    """The bytes of a segment, without a byte order mark at the start of its source.

    Raises:
        DataError: the file is shorter than when it was cut.
    """
    with Path(segment.path).open("rb", buffering=0) as stream:
        stream.seek(segment.start)
        wanted = segment.stop - segment.start
        data = stream.read(wanted) if wanted else b""
        while len(data) < wanted:
            more = stream.read(wanted - len(data))
            if not more:
                raise DataError(
                    f"`{segment.path}` became shorter while it was read", hint="let nothing write to the input"
                )
            data += more
    return data.removeprefix(_BOM) if segment.first else data


def drop_spool(segment: Segment) -> None:
    """Delete the spool file of a segment that is done."""
    if segment.spooled:
        Path(segment.path).unlink(missing_ok=True)


def clear_spool(folder: Path) -> None:
    for name in os.listdir(folder) if folder.is_dir() else ():  # noqa: PTH208
        (folder / name).unlink(missing_ok=True)
