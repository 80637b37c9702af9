"""Reading ``.gz`` and ``.zst``. Damage, a cut-off end above all, is an ``EOFError`` and never a shorter text."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import IO, Any

from mlm_cli.errors import DataError

PACKED = {".gz": "gz", ".zst": "zst", ".zstd": "zst"}
_BLOCK = 1 << 20
_STEP = 1024  # of zstd input at a time: it may unpack to 32 thousand times as much


def unpacked(raw: Any, packed: str | None, name: str) -> Any:
    """Something to ``read(size)`` the unpacked bytes of ``raw`` from.

    Args:
        raw: the stored bytes, with ``read(size)``.
        packed: gz, zst or None. name: what errors call the file.

    Raises:
        DataError: the package for ``.zst`` is missing. Reading raises EOFError for damage.
    """
    if packed == "gz":
        return _Gzip(gzip.GzipFile(fileobj=raw, mode="rb"))
    if packed == "zst":
        try:
            import zstandard
        except ImportError as error:
            raise DataError(f"`{name}` needs the zstandard package", hint="pip install 'mlm-cli[data]'") from error
        return _Zstd(raw, zstandard)
    return raw


def open_unpacked(path: Path) -> io.BufferedReader:
    """A file's bytes, unpacked if its name ends in ``.gz`` or ``.zst``, to be read whole or line by line.

    Raises:
        OSError: it does not open. DataError, EOFError: as for :func:`unpacked`.
    """
    stored = path.open("rb")
    try:
        stream = unpacked(stored, PACKED.get(path.suffix), str(path))
    except BaseException:
        stored.close()
        raise
    return stored if stream is stored else io.BufferedReader(_Raw(stream, stored), _BLOCK)


class _Gzip:
    def __init__(self, stream: gzip.GzipFile) -> None:
        self._stream = stream

    def read(self, size: int) -> bytes:
        try:
            return self._stream.read(size)
        except (zlib.error, gzip.BadGzipFile) as error:
            raise EOFError(str(error)) from error


class _Zstd:
    """Frames one after the other. The library's own file reader takes the end of the file for the end of a frame."""

    def __init__(self, raw: Any, library: Any) -> None:
        self._raw, self._library = raw, library
        self._frame: Any = None  # None between frames
        self._input = self._ready = memoryview(b"")

    def read(self, size: int) -> bytes:
        pieces = []
        while size > 0 and (self._ready or self._decompress()):
            piece, self._ready = self._ready[:size], self._ready[size:]
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def _decompress(self) -> bool:
        """Make more bytes ready; False at the end."""
        while not self._ready:
            if not self._input:
                self._input = memoryview(self._raw.read(_BLOCK // 8))
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the file ends in the middle of a zstd frame")
                return False
            if self._frame is None:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            piece = self._input[:_STEP]
            try:
                self._ready = memoryview(self._frame.decompress(piece))
            except self._library.ZstdError as error:
                raise EOFError(str(error)) from error
            left = len(self._frame.unused_data) if self._frame.eof else 0
            self._input = self._input[len(piece) - left :]
            if self._frame.eof:
                self._frame = None
        return True


class _Raw(io.RawIOBase):
    """What ``io.BufferedReader`` wants of the readers above."""

    def __init__(self, stream: Any, stored: IO[bytes]) -> None:
        self._stream, self._stored = stream, stored

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._stream.read(len(buffer))
        buffer[: len(block)] = block
        return len(block)

    def close(self) -> None:
        self._stored.close()
        super().close()
