"""Megatron's indexed data set: token ids in ``PREFIX.bin``, where each sequence and document lies in ``PREFIX.idx``.

Layout (little-endian), as ``megatron/core/datasets/indexed_dataset.py`` of Megatron-LM writes it: 9 bytes
``MMIDIDX\\0\\0``; u64 version 1; u8 dtype code; u64 S sequences; u64 D = documents + 1; i32[S] lengths in tokens;
i64[S] byte offsets into the ``.bin``; i64[D] document index: the number of sequences before each document, from 0 to S.
A document may hold no sequence at all (an empty text does).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import struct
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlm_cli.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER_BYTES = 34
DTYPE_CODES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_BLOCK = 1 << 20  # items handled at a time wherever a whole column is walked
_LOOKS, _LOOK = 16, 1 << 12  # blocks, and sequences of each, that tell whether a large set is one stream

Array = npt.NDArray[Any]


def optimal_dtype(vocab_size: int) -> type[np.generic]:
    """u16 for vocabularies below 65,500, else i32: the choice Megatron makes."""
    return np.uint16 if vocab_size < 65500 else np.int32


def dtype_code(dtype: npt.DTypeLike) -> int:
    for code, known in DTYPE_CODES.items():
        if np.dtype(known) == np.dtype(dtype):
            return code
    raise ValueError(f"{np.dtype(dtype)} cannot be stored in an indexed data set")


def index_header(dtype: npt.DTypeLike, num_sequences: int, num_documents: int) -> bytes:
    """The first 34 bytes of an ``.idx``."""
    return MAGIC + struct.pack("<QBQQ", VERSION, dtype_code(dtype), num_sequences, num_documents + 1)


def resolve_prefix(path: str | os.PathLike[str]) -> str:
    """Prefix of the ``.bin``/``.idx`` pair that ``path`` means.

    ``path`` may be the pair's own prefix, one of its two files, or the ``--output`` prefix given to ``mlm preprocess``
    (whose pair then is ``PATH_text_document`` or the only ``PATH_*_document``/``PATH_*_sentence``).

    Raises:
        DataError: no such pair, or several that fit.
    """
    text = os.fspath(path)
    for suffix in (".bin", ".idx"):
        text = text.removesuffix(suffix)
    for level in ("", "_text_document", "_text_sentence"):
        if Path(f"{text}{level}.idx").exists():
            return text + level
    base = Path(text)
    found = []
    if base.parent.is_dir() and not text.endswith("/"):
        for entry in sorted(base.parent.iterdir()):
            if entry.name.startswith(base.name + "_") and entry.name.endswith(("_document.idx", "_sentence.idx")):
                found.append(entry)
    if len(found) == 1:
        return str(found[0]).removesuffix(".idx")
    if found:
        names = ", ".join(f"`{entry.stem}`" for entry in found)
        raise DataError(f"`{text}` could mean any of {names}", hint="give the full prefix of one of them")
    if Path(text + ".bin").exists():
        raise DataError(f"`{text}.bin` has no `{text}.idx` beside it", hint="copy both files, or make them again")
    raise DataError(
        f"no indexed data set at `{text}`: neither `{text}.idx` nor `{text}_text_document.idx` exists",
        hint="make one with `mlm preprocess INPUT... --tokenizer TOK --output PREFIX`",
    )


class IndexedDataset:
    """A ``.bin/.idx`` pair, memory-mapped read-only. Nothing is loaded; opening costs the same at any size.

    Attributes:
        dtype: of the stored ids; lengths: i32[S] tokens per sequence; offsets: i64[S] bytes;
        document_index: i64[D]; document ``d`` is the sequences ``document_index[d]:document_index[d + 1]``.

    Raises:
        DataError: bad magic, version or dtype code, a damaged index, or a ``.bin`` of another size than the index says.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = resolve_prefix(prefix)
        self.bin_path, self.idx_path = self.prefix + ".bin", self.prefix + ".idx"
        self._maps: list[mmap.mmap] = []
        size = Path(self.idx_path).stat().st_size
        with open(self.idx_path, "rb") as stream:
            header = stream.read(HEADER_BYTES)
            index = self._map(stream, size)
        if len(header) < HEADER_BYTES or header[:9] != MAGIC:
            raise DataError(f"`{self.idx_path}` is not an index of an indexed data set (bad magic or too short)")
        version, code, num_sequences, num_offsets = struct.unpack("<QBQQ", header[9:])
        if version != VERSION:
            raise DataError(f"`{self.idx_path}` has version {version}; version {VERSION} can be read")
        if code not in DTYPE_CODES:
            raise DataError(f"`{self.idx_path}` has an unknown dtype code {code}")
        self.dtype = np.dtype(DTYPE_CODES[code])
        self.num_sequences, self.num_documents = int(num_sequences), int(num_offsets) - 1
        expected = HEADER_BYTES + 12 * self.num_sequences + 8 * int(num_offsets)
        # Megatron's multimodal sets carry one more byte per sequence (its mode) at the end; text never needs it
        if size not in (expected, expected + self.num_sequences):
            raise DataError(
                f"`{self.idx_path}` should be {expected:,} bytes for {self.num_sequences:,} sequences and "
                f"{self.num_documents:,} documents, but is {size:,}",
                hint="the file was cut short or damaged: copy it again, or run `mlm preprocess` again",
            )
        start = HEADER_BYTES
        self.lengths = np.frombuffer(index, np.int32, self.num_sequences, start)
        self.offsets = np.frombuffer(index, np.int64, self.num_sequences, start + 4 * self.num_sequences)
        self.document_index = np.frombuffer(index, np.int64, int(num_offsets), start + 12 * self.num_sequences)
        self._open_bin()

    def _map(self, stream: Any, size: int) -> Any:
        if size == 0:
            return b""  # an empty file cannot be mapped
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._maps.append(mapped)
        return mapped

    def _open_bin(self) -> None:
        if not Path(self.bin_path).exists():
            raise DataError(f"`{self.idx_path}` has no `{self.bin_path}` beside it", hint="copy both files")
        found = Path(self.bin_path).stat().st_size
        expected = 0
        if self.num_sequences:
            expected = int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize
        if found != expected:
            raise DataError(
                f"`{self.bin_path}` should be {expected:,} bytes by its index, but is {found:,}",
                hint="the two files do not belong together or a copy was cut short: run `mlm preprocess` again",
            )
        first = int(self.document_index[0]) if self.num_documents >= 0 else -1
        last = int(self.document_index[-1]) if self.num_documents >= 0 else -1
        if first != 0 or last != self.num_sequences:
            raise DataError(
                f"`{self.idx_path}`: its document index runs from {first} to {last}, not 0 to {self.num_sequences}"
            )
        with open(self.bin_path, "rb") as stream:
            self._bin = self._map(stream, found)
        self._flat: Array = np.frombuffer(self._bin, self.dtype, found // self.dtype.itemsize)

    @property
    def num_tokens(self) -> int:
        """All tokens of the set."""
        return int(self._flat.shape[0])

    @cached_property
    def contiguous(self) -> bool:
        """True when the sequences lie back to back in order, so that the ``.bin`` is one stream of tokens."""
        position = 0
        for start in range(0, self.num_sequences, _BLOCK):
            lengths = self.lengths[start : start + _BLOCK].astype(np.int64) * self.dtype.itemsize
            ends = np.cumsum(lengths) + position
            if not np.array_equal(self.offsets[start : start + _BLOCK], ends - lengths):
                return False
            position = int(ends[-1])
        return True

    @cached_property
    def one_stream(self) -> bool:
        """``contiguous`` as far as a bounded look can tell: all of a small set, evenly spread blocks of a large one.

        A set is opened in the same time at any size; the two ends of the ``.bin`` were compared with the index before.
        """
        if self.num_sequences <= _LOOKS * _LOOK:
            return self.contiguous
        for start in np.linspace(0, self.num_sequences - _LOOK, _LOOKS).astype(np.int64).tolist():
            offsets = self.offsets[start : start + _LOOK].astype(np.int64)
            lengths = self.lengths[start : start + _LOOK].astype(np.int64) * self.dtype.itemsize
            if not np.array_equal(offsets[1:], (offsets + lengths)[:-1]):
                return False
        return int(self.offsets[0]) == 0

    def sequence(self, index: int) -> Array:
        """Tokens of one sequence, a read-only view."""
        start = int(self.offsets[index])
        return np.frombuffer(self._bin, self.dtype, int(self.lengths[index]), start)

    def document(self, index: int) -> Array:
        """Tokens of one document: its sequences joined (a view when it has only one)."""
        first, last = int(self.document_index[index]), int(self.document_index[index + 1])
        if last - first == 1:
            return self.sequence(first)
        parts = [self.sequence(i) for i in range(first, last)]
        return np.concatenate(parts) if parts else np.zeros(0, self.dtype)

    def tokens(self, start: int, stop: int) -> Array:
        """Tokens ``start:stop`` of the whole ``.bin`` seen as one stream, a read-only view.

        Raises:
            DataError: the sequences do not lie back to back.
        """
        if not self.one_stream:
            raise DataError(f"`{self.bin_path}` is not one stream: its sequences do not lie back to back")
        return self._flat[start:stop]

    def max_token(self) -> int:
        """The largest id stored (-1 for an empty set); walks the ``.bin`` in flat memory."""
        top = -1
        for start in range(0, self.num_tokens, 16 * _BLOCK):
            top = max(top, int(self._flat[start : start + 16 * _BLOCK].max()))
        return top

    def close(self) -> None:
        """Let go of the maps. Views handed out before keep theirs alive until they are dropped."""
        self.lengths = self.offsets = self.document_index = self._flat = np.zeros(0, np.int64)
        self._bin = b""
        for mapped in self._maps:
            with contextlib.suppress(BufferError):  # a view is still in use somewhere: the map goes with it
                mapped.close()
        self._maps = []

    def __len__(self) -> int:
        return self.num_sequences


class IndexedParts:
    """A pair under construction in a folder of its own: three files that only ever grow at the end.

    ``NAME.bin`` ids, ``NAME.len`` i32 tokens per sequence, ``NAME.doc`` i64 sequences up to the end of each document.
    Sizes written down in a journal are enough to continue after a kill: cut the files there and go on.
    """

    SUFFIXES = ("bin", "len", "doc")

    def __init__(
        self, folder: str | os.PathLike[str], name: str, dtype: npt.DTypeLike, sizes: Sequence[int] = (0, 0, 0)
    ) -> None:
        self.dtype = np.dtype(dtype)
        self.paths = [Path(folder) / f"{name}.{suffix}" for suffix in self.SUFFIXES]
        self.sizes = list(sizes)
        self._files = []
        for path, size in zip(self.paths, self.sizes, strict=True):
            stream = path.open("r+b" if size else "wb", buffering=0)
            stream.truncate(size)
            stream.seek(size)
            self._files.append(stream)
        self.num_sequences, self.num_documents = self.sizes[1] // 4, self.sizes[2] // 8

    def append(self, tokens: Any, lengths: Array, sequences_per_document: Array) -> None:
        """Add whole documents: ids already in ``dtype`` (any bytes-like), i32 lengths, sequences of each document."""
        ends = np.cumsum(sequences_per_document, dtype=np.int64) + self.num_sequences
        for number, piece in enumerate((tokens, np.ascontiguousarray(lengths, np.int32), ends)):
            view = memoryview(piece).cast("B") if len(piece) else memoryview(b"")
            written = 0
            while written < len(view):
                written += self._files[number].write(view[written:])
            self.sizes[number] += len(view)
        self.num_sequences += len(lengths)
        self.num_documents += len(ends)

    def sync(self) -> None:
        """Make what was written so far survive a power cut."""
        for stream in self._files:
            os.fsync(stream.fileno())

    def close(self) -> None:
        for stream in self._files:
            stream.close()

    def write_index(self, path: str | os.PathLike[str]) -> None:
        """Write the ``.idx`` from the columns, in flat memory."""
        itemsize = self.dtype.itemsize
        with open(path, "wb") as out:
            out.write(index_header(self.dtype, self.num_sequences, self.num_documents))
            with open(self.paths[1], "rb") as column:
                shutil.copyfileobj(column, out, 1 << 20)
            position = 0
            with open(self.paths[1], "rb") as column:
                while block := column.read(4 * _BLOCK):
                    lengths = np.frombuffer(block, np.int32).astype(np.int64) * itemsize
                    ends = np.cumsum(lengths) + position
                    out.write((ends - lengths).tobytes())
                    position = int(ends[-1])
            out.write(struct.pack("<q", 0))
            with open(self.paths[2], "rb") as column:
                shutil.copyfileobj(column, out, 1 << 20)


class IndexedWriter:
    """Writes a pair sequence by sequence; nothing is seen under its final name before :meth:`finish`.

    >>> writer = IndexedWriter("out_text_document", np.uint16)
    >>> writer.add_sequence(np.array([1, 2, 3])); writer.end_document(); writer.finish()

    Memory stays flat: columns go to ``PREFIX.writing/`` and are joined at the end.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: npt.DTypeLike) -> None:
        self.prefix = os.fspath(prefix)
        self._folder = Path(self.prefix + ".writing")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._parts = IndexedParts(self._folder, "part", dtype)
        self._tokens: list[Array] = []
        self._lengths: list[int] = []
        self._documents: list[int] = []
        self._open_sequences = 0
        self._buffered = 0

    def add_sequence(self, tokens: npt.ArrayLike) -> None:
        """Append one sequence to the document being written."""
        array = np.ascontiguousarray(tokens, self._parts.dtype)
        self._tokens.append(array)
        self._lengths.append(array.shape[0])
        self._open_sequences += 1
        self._buffered += array.nbytes + 64

    def end_document(self) -> None:
        """Close the document being written (it may hold no sequence)."""
        self._documents.append(self._open_sequences)
        self._open_sequences = 0
        self._buffered += 8
        if self._buffered > 1 << 23:
            self._flush()

    def _flush(self) -> None:
        tokens = np.concatenate(self._tokens) if self._tokens else np.zeros(0, self._parts.dtype)
        self._parts.append(tokens, np.array(self._lengths, np.int32), np.array(self._documents, np.int64))
        self._tokens, self._lengths, self._documents, self._buffered = [], [], [], 0

    def finish(self) -> None:
        """Write the index and put both files in place: ``.bin`` first, ``.idx`` last."""
        if self._open_sequences:
            raise ValueError("the last document was not ended")
        self._flush()
        self._parts.sync()
        self._parts.close()
        index = self._folder / "part.idx"
        self._parts.write_index(index)
        self._parts.paths[0].replace(self.prefix + ".bin")
        index.replace(self.prefix + ".idx")
        shutil.rmtree(self._folder)

    def abandon(self) -> None:
        """Drop everything written."""
        self._parts.close()
        shutil.rmtree(self._folder, ignore_errors=True)
