"""``PREFIX.partial/``: a preprocessing run while it is not finished, from which the same command continues.

Everything in it only grows at its end, and one line of ``journal.jsonl`` holds the sizes that belong together: to
continue means cutting every file there. Final names appear in one step each at the very end, the ``.idx`` files last.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from mlm_cli.data.indexed import IndexedParts
from mlm_cli.data.segment import clear_spool
from mlm_cli.errors import UsageError

ORIGIN = np.dtype([("source", "<u4"), ("line", "<u8")])
_NPY_BYTES = 128


@dataclass
class Position:
    """How far a run has come: what the journal holds.

    ``source`` is being read, from ``resume`` (bytes, or rows of a table), ``line`` lines of it are done. ``sizes``:
    bytes of every growing file. ``removed`` by filter, ``redacted`` by kind in ``changed`` documents: see `clean.py`.
    """

    source: int = 0
    resume: int = 0
    line: int = 0
    consumed: int = 0
    documents: int = 0
    read: int = 0
    skipped: int = 0
    empty: int = 0
    removed: dict[str, int] = field(default_factory=dict)
    redacted: dict[str, int] = field(default_factory=dict)
    changed: int = 0
    here: dict[str, int] = field(default_factory=lambda: fresh_counts())
    max_token: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, list[int]] = field(default_factory=dict)


def fresh_counts() -> dict[str, int]:
    """Counts of the source being read, at its start."""
    return dict.fromkeys(("documents", "read", "skipped", "removed", "empty", "characters", "text_tokens"), 0)


class _Log:
    """A file that only grows; cut to ``size`` when opened."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self._file: IO[bytes] = path.open("r+b" if size else "wb", buffering=0)
        self._file.truncate(size)
        self._file.seek(size)

    def append(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = self._file.write(view)
            view = view[written:]
        self.size += len(data)

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class PartialRun:
    """The folder, locked while this object lives.

    Args:
        prefix: ``--output``. names: of each pair (``KEY_document``), by key. settings: what must be the same for the
            run to be continued; where only its ``sources`` differ, the run starts again.
    Raises:
        UsageError: another run holds the folder, or it was begun with other settings.
    """

    def __init__(
        self, prefix: str, names: dict[str, str], dtype: npt.DTypeLike, settings: dict[str, Any], *, fresh: bool = False
    ) -> None:
        self.prefix, self.names, self.dtype = prefix, names, np.dtype(dtype)
        self.folder = Path(prefix + ".partial")
        self.restarted_because: str | None = None
        self._lock = _take_lock(self.folder)
        try:
            self.position = Position() if fresh else self._found(settings)
            self.continued = self.position != Position()
            if not self.continued:
                self._clear()
            (self.folder / "job.json").write_text(json.dumps(settings), encoding="utf-8")
            self.spool = self.folder / "spool"
            self.spool.mkdir(exist_ok=True)
            clear_spool(self.spool)
            self._open()
        except BaseException:
            _release(self._lock)
            raise

    def _found(self, settings: dict[str, Any]) -> Position:
        """Where an earlier run stopped, or the beginning."""
        try:
            earlier = json.loads((self.folder / "job.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return Position()
        position = _last_position(self.folder / "journal.jsonl")
        if position is None:
            return Position()
        settings = json.loads(json.dumps(settings))
        changed = sorted(key for key in {*settings, *earlier} if settings.get(key) != earlier.get(key))
        if changed == ["sources"]:
            self.restarted_because = "the input changed since"
            return Position()
        if changed:
            what = ", ".join(f"`{key}`" for key in changed)
            raise UsageError(
                f"`{self.folder}` holds an unfinished run with other settings ({what})",
                hint="give the command of that run to finish it, or --overwrite to throw it away",
            )
        short = [name for name, sizes in position.sizes.items() if not self._has(name, sizes)]
        if short:
            self.restarted_because = f"`{short[0]}` in it is damaged"
            return Position()
        return position

    def _has(self, name: str, sizes: list[int]) -> bool:
        files = [name] if len(sizes) == 1 else [f"{name}.{suffix}" for suffix in IndexedParts.SUFFIXES]
        paths = [self.folder / file for file in files]
        return all(path.exists() and path.stat().st_size >= size for path, size in zip(paths, sizes, strict=True))

    def _clear(self) -> None:
        for entry in self.folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()

    def _open(self) -> None:
        sizes = self.position.sizes
        self.parts = {
            key: IndexedParts(self.folder, name, self.dtype, sizes.get(name, [0, 0, 0]))
            for key, name in self.names.items()
        }
        self.origins = _Log(self.folder / "origins", sizes.get("origins", [0])[0])
        self.bad = _Log(self.folder / "bad.jsonl", sizes.get("bad.jsonl", [0])[0])
        self.sources = _Log(self.folder / "sources.jsonl", sizes.get("sources.jsonl", [0])[0])
        self.removed = _Log(self.folder / "removed.jsonl", sizes.get("removed.jsonl", [0])[0])
        self.seen = _Log(self.folder / "seen", sizes.get("seen", [0])[0])
        if not self.origins.size:
            self.origins.append(_npy_header(0))
        self.mark()

    def origin(self, document: int) -> tuple[int, int]:
        """(source, line) of a document written so far."""
        with self.origins.path.open("rb") as stream:
            stream.seek(_NPY_BYTES + document * ORIGIN.itemsize)
            record = np.frombuffer(stream.read(ORIGIN.itemsize), ORIGIN)[0]
        return int(record["source"]), int(record["line"])

    def start_again(self) -> None:
        """Forget everything read so far."""
        self._close_files()
        self._clear()
        self.spool.mkdir(exist_ok=True)
        self.position = Position()
        self._open()

    def mark(self) -> None:
        """The files and the position agree now: what :meth:`checkpoint` writes, even if a later step fails half-way."""
        sizes = {self.names[key]: list(part.sizes) for key, part in self.parts.items()}
        logs = {"origins": self.origins, "bad.jsonl": self.bad, "sources.jsonl": self.sources}
        logs |= {"removed.jsonl": self.removed, "seen": self.seen}
        sizes |= {name: [log.size] for name, log in logs.items()}
        self._marked = asdict(self.position) | {"sizes": sizes}

    @property
    def marked_documents(self) -> int:
        """Documents up to the last mark."""
        return int(self._marked["documents"])

    def checkpoint(self) -> None:
        """Write down the last mark; everything up to it survives a kill."""
        for growing in self._growing():
            growing.sync()
        with (self.folder / "journal.jsonl").open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(self._marked) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    @property
    def has_journal(self) -> bool:
        return (self.folder / "journal.jsonl").exists()

    def _close_files(self) -> None:
        for growing in self._growing():
            growing.close()

    def _growing(self) -> list[IndexedParts | _Log]:
        return [*self.parts.values(), self.origins, self.bad, self.sources, self.removed, self.seen]

    def publish(self, sidecar_text: str) -> None:
        """Put everything under its final name: data first, the ``.idx`` files that make it visible last."""
        lists = {log.path.name: log.size > 0 for log in (self.bad, self.removed)}
        moves: list[tuple[str, str]] = []
        for key, name in self.names.items():
            self.parts[key].write_index(self.folder / f"{name}.idx")
            moves.append((f"{name}.bin", f"{self.prefix}_{name}.bin"))
        with self.origins.path.open("r+b") as stream:
            stream.write(_npy_header((self.origins.size - _NPY_BYTES) // ORIGIN.itemsize))
        moves.append(("origins", f"{self.prefix}.origins.npy"))
        moves += [(name, f"{self.prefix}.{name}") for name, filled in lists.items() if filled]
        (self.folder / "sidecar.json").write_text(sidecar_text, encoding="utf-8")
        moves.append(("sidecar.json", f"{self.prefix}.json"))
        moves += [(f"{name}.idx", f"{self.prefix}_{name}.idx") for name in self.names.values()]
        self._close_files()
        # from here on a killed run is finished by the next one: see finish_publishing
        plan = self.folder / "publish.json"
        plan.with_suffix(".new").write_text(json.dumps(moves), encoding="utf-8")
        plan.with_suffix(".new").replace(plan)
        for name, filled in lists.items():
            if not filled:  # that of an older data set of this name has no successor
                Path(f"{self.prefix}.{name}").unlink(missing_ok=True)
        _move(self.folder, moves)
        self.remove()

    def stop(self, *, keep: bool) -> None:
        """Leave without finishing. ``keep`` leaves what the journal covers for the next run."""
        self._close_files()
        clear_spool(self.spool)
        if keep and self.has_journal:
            _release(self._lock)
        else:
            self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        _release(self._lock)


def finish_publishing(prefix: str) -> bool:
    """Complete a run that was killed while its files were being put in place; True if there was one."""
    folder = Path(prefix + ".partial")
    plan = folder / "publish.json"
    if not plan.exists():
        return False
    lock = _take_lock(folder)
    try:
        if plan.exists():
            _move(folder, json.loads(plan.read_text(encoding="utf-8")))
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        _release(lock)
    return True


def _move(folder: Path, moves: list[tuple[str, str]] | list[list[str]]) -> None:
    finals = [Path(final) for _, final in moves]
    if all((folder / name).exists() for name, _ in moves):
        for final in finals:  # an older data set of that name goes first, its index before its data
            if final.suffix == ".idx":
                final.unlink(missing_ok=True)
    for (name, _), final in zip(moves, finals, strict=True):
        if (folder / name).exists():
            (folder / name).replace(final)


_held: set[int] = set()


def _forget_locks() -> None:
    """In a forked worker: or it would keep the folder locked for a while after its parent was killed."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def _release(lock: int) -> None:
    _held.discard(lock)
    os.close(lock)


def _take_lock(folder: Path) -> int:
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            if error.errno == errno.ENOENT and folder.parent.is_dir():
                continue  # the run before us took its folder away between our two steps
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UsageError(f"`{folder}` cannot be made: {error.strerror}", hint="choose another --output") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise UsageError(
                f"output `{str(folder).removesuffix('.partial')}` is in use by another run",
                hint="wait for it, or choose another --output",
            ) from error
        with contextlib.suppress(OSError):
            if os.stat(folder / "lock").st_ino == os.fstat(lock).st_ino:  # noqa: PTH116 - two of a kind
                _held.add(lock)
                return lock
        os.close(lock)  # the run before us finished and took its folder away between our two steps


def _last_position(journal: Path) -> Position | None:
    try:
        lines = journal.read_bytes().split(b"\n")
    except OSError:
        return None
    for line in reversed(lines):
        with contextlib.suppress(ValueError, TypeError):  # the last line may have been cut short
            return Position(**json.loads(line))
    return None


def _npy_header(count: int) -> bytes:
    """A NumPy 1.0 header of fixed size, so that it can be written again when the count is known."""
    text = f"{{'descr': {ORIGIN.descr!r}, 'fortran_order': False, 'shape': ({count},), }}"
    room = _NPY_BYTES - 10
    return b"\x93NUMPY\x01\x00" + room.to_bytes(2, "little") + text.ljust(room - 1).encode("ascii") + b"\n"


def origins_of(results: npt.NDArray[np.int64], source: int, line: int) -> bytes:
    """Origin records of documents at these line numbers (within a segment that begins behind ``line``)."""
    records = np.empty(results.shape[0], ORIGIN)
    records["source"] = source
    records["line"] = results + line
    return records.tobytes()
