"""The run folder: which checkpoints it holds, which is the newest, and who may write to it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Container, Iterator
from pathlib import Path
from typing import IO

from mlm_cli import log
from mlm_cli.errors import ResourceError, UsageError

_STEP = re.compile(r"^step-(\d{8,})$")
_LEFTOVER = re.compile(r"^\.(tmp|trash)-step-\d+")
_held: set[Path] = set()  # POSIX record locks do not exclude within one process
_removals: dict[Path, threading.Thread] = {}  # what is being deleted in the background, by run folder


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def fsync_path(path: Path) -> None:
    """Make a file or a folder's list of names survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace a small file so that a reader sees the old or the new text, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync_path(path.parent)


class RunFolder:
    """Names inside ``runs/NAME`` (DESIGN section 2)."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()

    def __str__(self) -> str:
        return str(self.path)

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def ds_config(self) -> Path:
        return self.path / "ds_config.json"

    def log_file(self, rank: int) -> Path:
        return self.path / "logs" / f"rank-{rank}.log"

    def checkpoint(self, step: int) -> Path:
        return self.path / step_name(step)

    def temporary(self, step: int) -> Path:
        """Where a checkpoint is written before it gets its name."""
        return self.path / f".tmp-{step_name(step)}"

    def steps(self) -> list[int]:
        """Steps of the checkpoints that bear their final name, ascending."""
        if not self.path.is_dir():
            return []
        matches = (_STEP.match(entry.name) for entry in self.path.iterdir() if entry.is_dir())
        return sorted(int(match.group(1)) for match in matches if match)

    def set_latest(self, step: int) -> None:
        """Point ``latest`` at a checkpoint, atomically; the last act of a save."""
        write_atomic(self.path / "latest", step_name(step) + "\n")

    def set_best(self, step: int) -> None:
        """Point ``best`` at a checkpoint; from then on it is not pruned."""
        write_atomic(self.path / "best", step_name(step) + "\n")

    def best(self) -> int | None:
        """Step of the checkpoint that ``best`` points at, where there is such a pointer and it is still there."""
        try:
            match = _STEP.match((self.path / "best").read_text(encoding="utf-8").strip())
        except OSError:
            return None
        step = int(match.group(1)) if match else None
        return step if step is not None and self.checkpoint(step).is_dir() else None

    def discard(self, folder: Path) -> None:
        """Remove a checkpoint so that no half of it is ever seen under its name."""
        if folder.exists():
            self.finish_removals()
            shutil.rmtree(self._put_aside(folder), ignore_errors=True)

    def _put_aside(self, folder: Path) -> Path:
        """Take a folder's name away; returns the one it has now."""
        trash = folder.with_name(f".trash-{folder.name.lstrip('.')}-{os.getpid()}")
        shutil.rmtree(trash, ignore_errors=True)
        return folder.rename(trash)

    def finish_removals(self) -> None:
        """Wait until what ``prune`` took away is off the disk."""
        if (removal := _removals.pop(self.path, None)) is not None:
            removal.join()

    def remove_leftovers(self) -> None:
        """Remove what a killed run left under temporary names. Only under the lock."""
        for entry in self.path.iterdir():
            if _LEFTOVER.match(entry.name):
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name.startswith(".") and entry.name.endswith(".tmp"):
                entry.unlink(missing_ok=True)

    def prune(self, keep_last: int, newest: int, also: Container[int] = ()) -> None:
        """Remove all but the best, those of ``also`` and the last ``keep_last`` checkpoints; 0 keeps all.

        They are gone from the run at once, from the disk a little later: deleting large files takes seconds, for which
        training would wait.

        Args:
            newest: step of the one that has just been verified. Later ones were passed over as damaged when the run
                went on, and must take no sound one's place: they neither count nor go.
        """
        if keep_last > 0:
            best = self.best()
            old = [step for step in self.steps() if step <= newest][:-keep_last]
            self.finish_removals()
            trash = [self._put_aside(self.checkpoint(step)) for step in old if step != best and step not in also]
            if trash:
                self._remove_later(trash)

    def _remove_later(self, folders: list[Path]) -> None:
        def remove() -> None:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)

        removal = threading.Thread(target=remove, name="remove-checkpoints", daemon=True)
        _removals[self.path] = removal
        removal.start()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; the kernel lets go of it when the process dies, however it dies.

        Raises:
            UsageError: another process holds it, or the folder cannot be made or written.
        """
        if self.path in _held:  # must not even open the file: closing it would let go of the lock
            raise self._in_use("this very process")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"cannot write to the output folder {self.path}: {error.strerror}",
                hint="choose another folder with --output",
            ) from None
        with file:
            self._acquire(file)
            _held.add(self.path)
            try:
                file.seek(0)
                file.truncate()
                json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}, file)
                file.flush()
                yield
            finally:
                _held.discard(self.path)
                with contextlib.suppress(OSError):
                    file.seek(0)
                    file.truncate()
                    file.flush()
                self.finish_removals()  # under the lock, which goes with the file

    def _acquire(self, file: IO[str]) -> None:
        try:
            # A record lock, unlike flock, is not inherited by forked loader workers that outlive a killed run.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                log.warn(f"{self.path}: no file locks here ({error.strerror}); do not start two runs in this folder")
                return
            file.seek(0)
            try:
                holder = json.loads(file.read())
                who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
            except (ValueError, KeyError):
                who = "another process"
            raise self._in_use(who) from None

    def _in_use(self, who: str) -> UsageError:
        return UsageError(
            f"the output folder {self.path} is in use by {who}",
            hint="wait for that run, stop it, or choose another folder with --output",
        )


def check_free_space(path: Path, needed: int, what: str) -> None:
    """Raise ``ResourceError`` unless ``needed`` bytes (and 1 % for the file system) are free at ``path``."""
    free = shutil.disk_usage(path).free
    if free < needed * 1.01:
        raise ResourceError(
            f"{what} needs {needed / 1e9:.2f} GB but only {free / 1e9:.2f} GB are free at {path}",
            hint="free some space, lower checkpoint.keep_last, or choose another --output; nothing was overwritten",
        )
