"""Writing a checkpoint so that at every moment the newest one under its final name is whole.

Everything is written under a temporary name, made durable and read back; then the folder gets its name, then ``latest``
points at it, and only then older checkpoints go. A failure at any point leaves the previous checkpoint as it was.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from mlm_cli import __version__
from mlm_cli.checkpoint import agree
from mlm_cli.checkpoint.folder import RunFolder, check_free_space, fsync_path
from mlm_cli.checkpoint.manifest import MANIFEST, FileRecord, Manifest, hash_file, list_files
from mlm_cli.checkpoint.state import HasState, Position, Streams, layout_of, rank_file, state_bytes, write_state
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


class Checkpointer:
    """Saves one run's checkpoints; every method is called by all ranks together.

    Args:
        write_model: ``write_model(folder, position, metrics)`` writes ``model/``; all ranks call it, rank 0 writes. The
            model's parameters are then the float32 masters.
        keep_last: how many checkpoints stay; 0: all.
    """

    def __init__(
        self,
        run: RunFolder,
        engine: SavedEngine,
        parallel: ParallelContext,
        *,
        write_model: Callable[[Path, Position, Mapping[str, float]], Any],
        streams: Streams | None = None,
        identity: Identity,
        keep_last: int = 3,
    ) -> None:
        self.run, self.engine, self.parallel, self.streams = run, engine, parallel, streams
        self.write_model, self.identity = write_model, identity
        self.keep_last = keep_last
        self.last_saved: int | None = None

    def bytes_needed(self) -> int:
        """Size of one checkpoint in bytes: the state files of all ranks, and ``model/`` in float32."""
        weights = sum(math.prod(fragment.shape) for fragment in self.engine.fragments()) * 4
        # Tensor ranks hold slices of the model, data ranks copies of which one is written.
        mine = state_bytes(self.engine) + weights / self.parallel.data.size
        total = torch.tensor(mine, dtype=torch.float64, device=self.parallel.device)
        return int(self.parallel.world.all_reduce_(total)) + (1 << 20)

    def check_space(self, num_checkpoints: int) -> None:
        """Before step 1: is there room for the checkpoints that will exist side by side?

        Raises:
            ResourceError: there is not.
        """
        needed = self.bytes_needed()
        present = agree.on_rank_zero(lambda: len(self.run.steps()))
        together = min(num_checkpoints, self.keep_last + 1) if self.keep_last else 1
        count = max(1, together - present)
        what = f"{count} checkpoint{'s' if count > 1 else ''} of {needed / 1e9:.2f} GB"
        agree.on_rank_zero(lambda: check_free_space(self.run.path, needed * count, what))

    def save(self, position: Position, metrics: dict[str, float] | None = None) -> Path:
        """Write the checkpoint of ``position.step`` and make it the latest; returns its folder.

        Raises:
            ResourceError: no room, found before or while writing. The previous checkpoint is intact.
            CheckpointError: the folder cannot be written, or reads back differently.
        """
        final, temporary = self.run.checkpoint(position.step), self.run.temporary(position.step)
        needed = self.bytes_needed()
        try:
            agree.on_rank_zero(lambda: self._prepare(temporary, needed))
            record = agree.all_succeed(lambda: self._write_state(temporary, position))
            agree.all_succeed(lambda: self._write_model(temporary / "model", position, metrics or {}))
            records = self._gather(record)
            agree.on_rank_zero(lambda: self._commit(temporary, final, position, records, metrics or {}))
        except MlmError:
            agree.on_rank_zero(lambda: self.run.discard(temporary))
            raise
        self.last_saved = position.step
        return final

    def _prepare(self, temporary: Path, needed: int) -> None:
        with agree.disk_errors(temporary, "making"):
            self.run.discard(temporary)
            check_free_space(self.run.path, needed, "a checkpoint")
            (temporary / "model").mkdir(parents=True)
            (temporary / "state").mkdir()

    def _write_state(self, temporary: Path, position: Position) -> FileRecord:
        path = temporary / rank_file(self.parallel.world.rank)
        with agree.disk_errors(path, "writing"):
            record = write_state(temporary, self.engine, self.streams, position, self.parallel)
            if hash_file(path) != record:
                raise CheckpointError(f"{path} reads back differently than it was written", hint="check this disk")
        return record

    def _write_model(self, folder: Path, position: Position, metrics: Mapping[str, float]) -> None:
        with agree.disk_errors(folder, "writing"), self.engine.fp32_weights():
            self.write_model(folder, position, metrics)

    def _gather(self, record: FileRecord) -> list[FileRecord]:
        if self.parallel.world.size == 1:
            return [record]
        records: list[Any] = [None] * self.parallel.world.size
        dist.all_gather_object(records, record)
        return records

    def _commit(
        self, temporary: Path, final: Path, position: Position, records: list[FileRecord], metrics: dict[str, float]
    ) -> None:
        """Rank 0: manifest, final name, ``latest``, then the old ones."""
        with agree.disk_errors(temporary, "writing"):
            files = {rank_file(rank): record for rank, record in enumerate(records)}
            for name in list_files(temporary):
                if name not in files:
                    files[name] = hash_file(temporary / name)
                    fsync_path(temporary / name)
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
            self.run.prune(self.keep_last)


def versions() -> dict[str, str]:
    """Versions worth knowing when a checkpoint is opened years later."""
    return {"mlm": __version__, "torch": torch.__version__, "python": platform.python_version()}
