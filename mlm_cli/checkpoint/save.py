"""Writing a checkpoint so that at every moment the newest one under its final name is whole.

A save has three parts: the state is taken (all ranks, with collectives), written and read back (each rank for itself,
in the background if asked for, from a copy), and committed (all ranks, once each has written its part).

Everything is written under a temporary name, made durable and read back; then the folder gets its name, then ``latest``
points at it, and only then older checkpoints go. A failure at any point leaves the previous checkpoint as it was.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from mlm_cli import __version__
from mlm_cli.checkpoint import agree
from mlm_cli.checkpoint.background import Work, has_room_for
from mlm_cli.checkpoint.folder import RunFolder, check_free_space, fsync_path
from mlm_cli.checkpoint.manifest import MANIFEST, FileRecord, Manifest, hash_file, list_files, read_manifest
from mlm_cli.checkpoint.state import (
    HasState,
    Position,
    StateFile,
    Streams,
    collect_state,
    layout_of,
    rank_file,
    state_bytes,
)
from mlm_cli.errors import CheckpointError, MlmError
from mlm_cli.parallel.context import ParallelContext


class SavedEngine(HasState, Protocol):
    """An engine whose model can be written: ``model/`` holds the float32 master weights."""

    model: torch.nn.Module

    def fp32_weights(self) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class Identity:
    """What ties a checkpoint to its run."""

    recipe_hash: str
    data_fingerprint: str | None = None


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete: its step and folder; seconds that training waited, and that were spent on it."""

    step: int
    folder: Path
    blocked: float
    seconds: float


# By one rank: the record of its state, and those of its files of `model/`, by their names below the checkpoint.
_Written = tuple[FileRecord, dict[str, FileRecord]]


@dataclass
class _Pending:
    """A checkpoint being written: this rank's state, its share of ``model/``, and the hashes of both."""

    position: Position
    metrics: dict[str, float]
    work: Work[_Written]
    aside: bool  # training goes on meanwhile
    blocked: float


class Checkpointer:
    """Saves one run's checkpoints; every method is called by all ranks together.

    Args:
        write_model: ``write_model(folder, position, metrics)`` writes ``model/``; all ranks call it and share the
            weights, rank 0 writes all else. The model's parameters are then the float32 masters. With ``background`` it
            is given a list as a fourth argument and leaves the writing to functions that it adds there
            (``hub.save_model_folder``'s ``later``). It may return the records of files that this rank has written and
            read back, by name, filled in at the latest when those are done.
        background: ``save(wait=False)`` copies the state and writes while training goes on, where memory allows.
        keep_last: how many checkpoints stay; 0: all.
        keep_best: how many of the lowest ``valid_loss`` stay beside them.
    """

    def __init__(
        self,
        run: RunFolder,
        engine: SavedEngine,
        parallel: ParallelContext,
        *,
        write_model: Callable[..., Any],
        streams: Streams | None = None,
        identity: Identity,
        keep_last: int = 3,
        keep_best: int = 0,
        background: bool = False,
    ) -> None:
        self.run, self.engine, self.parallel, self.streams = run, engine, parallel, streams
        self.write_model, self.identity = write_model, identity
        self.keep_last, self.keep_best, self.background = keep_last, keep_best, background
        self._pending: _Pending | None = None
        self.last_saved: int | None = None

    def bytes_needed(self) -> int:
        """Size of one checkpoint in bytes: the state files of all ranks, and ``model/`` in float32."""
        weights = sum(math.prod(fragment.shape) for fragment in self.engine.fragments()) * 4
        # Tensor ranks hold slices of the model, data and context ranks copies of which one is written.
        mine = state_bytes(self.engine) + weights / self.parallel.replicas.size
        total = torch.tensor(mine, dtype=torch.float64, device=self.parallel.device)
        return int(self.parallel.world.all_reduce_(total)) + (1 << 20)

    def check_space(self, num_checkpoints: int) -> None:
        """Before step 1: is there room for the checkpoints that will exist side by side?

        Raises:
            ResourceError: there is not.
        """
        needed = self.bytes_needed()
        present = agree.on_rank_zero(lambda: len(self.run.steps()))
        together = min(num_checkpoints, self.keep_last + self.keep_best + 1) if self.keep_last else 1
        count = max(1, together - present)
        what = f"{count} checkpoint{'s' if count > 1 else ''} of {needed / 1e9:.2f} GB"
        agree.on_rank_zero(lambda: check_free_space(self.run.path, needed * count, what))

    def save(self, position: Position, metrics: dict[str, float] | None = None, *, wait: bool = True) -> Saved | None:
        """Write the checkpoint of ``position.step`` and make it the latest.

        Args:
            wait: until it is complete. Else it may go on in the background: ``finish`` it when ``writing`` is over on
                all ranks. A save begins by finishing the one before.

        Returns:
            the last checkpoint completed here; None: none was.

        Raises:
            ResourceError: no room, found before or while writing. The previous checkpoint is intact.
            CheckpointError: the folder cannot be written, or reads back differently.
        """
        before = self.finish()
        begin = time.perf_counter()
        temporary = self.run.temporary(position.step)
        needed = self.bytes_needed()
        aside = self.background and not wait and self._has_room(needed)
        later: list[Callable[[], None]] = []
        try:
            agree.on_rank_zero(lambda: self._prepare(temporary, needed))
            state = agree.all_succeed(
                lambda: collect_state(self.engine, self.streams, position, self.parallel, copy=aside)
            )
            # Nothing changes while training waits: the state is written beside `model/`, a hash on each core.
            written = None if aside else self._start_state(temporary, state)
            given = (temporary / "model", position, metrics or {}, *((later,) if aside else ()))
            try:
                weights = agree.all_succeed(lambda: self._write_model(*given))
            finally:
                if written is not None:
                    written.wait()
        except MlmError:
            agree.on_rank_zero(lambda: self.run.discard(temporary))
            raise

        def write() -> _Written:
            return self._write(temporary, written or self._start_state(temporary, state), later, weights)

        work = Work(write, in_thread=aside)
        self._pending = _Pending(position, metrics or {}, work, aside, time.perf_counter() - begin)
        return before if aside else self.finish()

    @property
    def pending(self) -> bool:
        """Has a save begun that is not complete? Equal on all ranks."""
        return self._pending is not None

    @property
    def writing(self) -> bool:
        """Is this rank still writing?"""
        return self._pending is not None and self._pending.work.running

    def finish(self) -> Saved | None:
        """Wait for the save under way and commit it; None where there is none. Errors as in ``save``."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        begin = time.perf_counter()
        position, metrics = pending.position, pending.metrics
        final, temporary = self.run.checkpoint(position.step), self.run.temporary(position.step)
        try:
            mine = agree.all_succeed(pending.work.result)
            written = self._gather(mine)
            agree.on_rank_zero(lambda: self._commit(temporary, final, position, written, metrics))
        except MlmError:
            agree.on_rank_zero(lambda: self.run.discard(temporary))
            raise
        self.last_saved = position.step
        self.committed(position, metrics)
        blocked = pending.blocked + time.perf_counter() - begin
        return Saved(position.step, final, blocked, blocked + (pending.work.seconds if pending.aside else 0.0))

    def _best_steps(self) -> list[int]:
        """Steps of the ``keep_best`` checkpoints with the lowest validation loss; of equals the earlier."""
        scored: list[tuple[float, int]] = []
        for step in self.run.steps() if self.keep_best else ():
            try:
                score = read_manifest(self.run.checkpoint(step)).metrics.get("valid_loss")
            except CheckpointError:
                continue  # damaged: worth nothing
            if score is not None and math.isfinite(score):
                scored.append((score, step))
        return [step for _, step in sorted(scored)[: self.keep_best]]

    def committed(self, position: Position, metrics: dict[str, float]) -> None:
        """Called by all ranks when a checkpoint is complete; for jobs that do more."""

    def _has_room(self, needed: int) -> bool:
        """Can every rank hold a copy of its part? Ranks of one machine share its memory: each asks for all of it."""
        full = torch.tensor(0.0 if has_room_for(needed) else 1.0, device=self.parallel.device)
        return float(self.parallel.world.all_reduce_(full)) == 0.0

    def _prepare(self, temporary: Path, needed: int) -> None:
        with agree.disk_errors(temporary, "making"):
            self.run.discard(temporary)
            self.run.finish_removals()  # space that is about to be free
            check_free_space(self.run.path, needed, "a checkpoint")
            (temporary / "model").mkdir(parents=True)
            (temporary / "state").mkdir()

    def _start_state(self, temporary: Path, state: StateFile) -> Work[FileRecord]:
        def write() -> FileRecord:
            with agree.disk_errors(temporary / state.name, "writing"):
                return state.write(temporary)

        return Work(write, in_thread=True)

    def _write(
        self,
        temporary: Path,
        state: Work[FileRecord],
        later: list[Callable[[], None]],
        weights: Mapping[str, FileRecord],
    ) -> _Written:
        """This rank's part, read back: the record of its state, and those of its files of ``model/``.

        Args:
            state: the writing of this rank's state, begun.
            weights: records of this rank's files of ``model/`` by name, when ``later`` is done.
        """
        with agree.disk_errors(temporary / "model", "writing"):
            try:
                for action in later:
                    action()
            finally:
                state.wait()
            files = {f"model/{name}": record for name, record in weights.items()}
            if self.parallel.world.rank == 0:
                for name in list_files(temporary / "model"):
                    if not name.endswith(".safetensors"):  # which other ranks may be writing
                        files[f"model/{name}"] = _record(temporary / "model" / name)
            return state.result(), files

    def _write_model(self, folder: Path, *given: Any) -> Mapping[str, FileRecord]:
        with agree.disk_errors(folder, "writing"), self.engine.fp32_weights():
            return self.write_model(folder, *given) or {}

    def _gather(self, mine: _Written) -> list[_Written]:
        """What all ranks have written, in their order."""
        if self.parallel.world.size == 1:
            return [mine]
        everywhere: list[Any] = [None] * self.parallel.world.size
        dist.all_gather_object(everywhere, mine)
        return everywhere

    def _commit(
        self,
        temporary: Path,
        final: Path,
        position: Position,
        written: list[_Written],
        metrics: dict[str, float],
    ) -> None:
        """Rank 0: manifest, final name, ``latest``, then the old ones."""
        with agree.disk_errors(temporary, "writing"):
            files = {rank_file(rank): record for rank, (record, _) in enumerate(written)}
            for _, weights in written:
                files |= weights
            for name in list_files(temporary):  # what was written without a word
                if name not in files:
                    files[name] = _record(temporary / name)
            manifest = Manifest(
                step=position.step,
                consumed_samples=position.consumed_samples,
                recipe_hash=self.identity.recipe_hash,
                data_fingerprint=self.identity.data_fingerprint,
                layout=layout_of(self.parallel),
                files=files,
                versions=versions(),
                metrics=metrics,
            )
            (temporary / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
            fsync_path(temporary / MANIFEST)
            for folder in (temporary / "model", temporary / "state", temporary):
                fsync_path(folder)
            self.run.discard(final)  # a damaged or superseded one of the same step
            temporary.rename(final)
            self.run.set_latest(position.step)  # makes the run folder durable too
            self.run.prune(self.keep_last, position.step, self._best_steps())


def _record(path: Path) -> FileRecord:
    """Of a file that nobody has read back, made durable."""
    record = hash_file(path)
    fsync_path(path)
    return record


def versions() -> dict[str, str]:
    """Versions worth knowing when a checkpoint is opened years later."""
    return {"mlm": __version__, "torch": torch.__version__, "python": platform.python_version()}
