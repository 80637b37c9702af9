"""What the user named -> the list of files to read, in a fixed order, each with its format. Nothing is read here."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlm_cli.data.compressed import PACKED
from mlm_cli.errors import DataError, UsageError

FORMATS = ("auto", "jsonl", "txt", "parquet")
_SUFFIXES = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    **dict.fromkeys((".txt", ".text"), "txt"),
    ".parquet": "parquet",
}
_KNOWN = ".jsonl, .json, .txt or .parquet, each also .gz or .zst"


@dataclass(frozen=True)
class Source:
    """One input. ``format``: jsonl, txt, parquet or hub; ``packed``: gz, zst or None; ``size`` in bytes as stored."""

    path: str
    format: str
    packed: str | None = None
    size: int = 0
    modified: int = 0

    @property
    def is_stream(self) -> bool:
        """True where nothing can be read twice (standard input, a pipe)."""
        return self.path == "-" or self.modified < 0


def bytes_of(flag: str, megabytes: float) -> int:
    """MiB given by hand, in bytes.

    Raises:
        UsageError: not a size.
    """
    if not 0 < megabytes < float("inf"):
        raise UsageError(f"`{flag}` must be a number above 0; it is {megabytes:g}")
    return int(megabytes * 2**20)


def find_sources(inputs: Sequence[str], input_format: str = "auto") -> list[Source]:
    """Expand files, folders (recursive, sorted by path), globs, `-` and Hub data sets.

    Raises:
        DataError: a missing file, a folder or glob with nothing to read, an unknown format.
        UsageError: no input, or `-` more than once.
    """
    if not inputs:
        raise UsageError("no input", hint="name files, folders, globs, a Hub data set, or `-` for standard input")
    if list(inputs).count("-") > 1:
        raise UsageError("standard input `-` can be read only once")
    found: list[Source] = []
    for given in inputs:
        if given == "-":
            found.append(Source("-", "jsonl" if input_format == "auto" else input_format))
        elif given.startswith("hf://") or _looks_like_hub(given):
            found.append(Source(given if given.startswith("hf://") else f"hf://{given}", "hub"))
        else:
            found += _local(given, input_format)
    return found


def _looks_like_hub(given: str) -> bool:
    """`owner/name`, where neither that path nor a folder `owner` is here: a mistyped path must stay one."""
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*", given) or Path(given).suffix in {
        **_SUFFIXES,
        **PACKED,
    }:
        return False
    path = Path(given)
    return not path.exists() and not path.parent.exists()


def _local(given: str, input_format: str) -> list[Source]:
    path = Path(given).expanduser()
    if path.is_dir():
        files = [
            Path(folder, name)
            for folder, folders, names in os.walk(path)
            if not folders.sort()  # type: ignore[func-returns-value]  # walk in order
            for name in sorted(names)
            if not name.startswith(".") and (input_format != "auto" or text_format(name) is not None)
        ]
        if not files:
            raise DataError(f"folder `{given}` has no file to read", hint=f"names must end in {_KNOWN}")
        return [_file(file, input_format) for file in sorted(files)]
    if path.exists() or path.is_symlink():
        return [_file(path, input_format)]
    if glob.has_magic(given):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207 - absolute too
        files = [match for match in matches if match.is_file()]
        if not files:
            raise DataError(f"`{given}` matches no file")
        return [_file(file, input_format) for file in files]
    raise DataError(f"`{given}` does not exist", hint="check the path; a Hub data set is written hf://owner/name")


def text_format(name: str) -> tuple[str, str | None] | None:
    """(jsonl, txt or parquet; gz, zst or None) by a file's name; None where it says nothing."""
    packed = PACKED.get(Path(name).suffix)
    stem = Path(name).stem if packed else name
    known = _SUFFIXES.get(Path(stem).suffix)
    return (known, packed) if known else None


def _file(path: Path, input_format: str) -> Source:
    try:
        info = path.stat()
        with path.open("rb"):
            pass
    except OSError as error:
        raise DataError(f"`{path}` cannot be read: {error.strerror or error}") from error
    known = text_format(path.name)
    packed = known[1] if known else PACKED.get(path.suffix)
    if input_format != "auto":
        known = (input_format, packed)
    if known is None:
        raise DataError(
            f"`{path}` has an unknown format", hint=f"names end in {_KNOWN}; otherwise say which with --input-format"
        )
    modified = info.st_mtime_ns if stat.S_ISREG(info.st_mode) else -1
    return Source(str(path), known[0], packed, info.st_size, modified)
