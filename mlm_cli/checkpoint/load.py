"""Finding the newest sound checkpoint of a run, and putting its state back into an engine of any layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlm_cli import log
from mlm_cli.checkpoint import agree
from mlm_cli.checkpoint.folder import RunFolder
from mlm_cli.checkpoint.manifest import Manifest, find_damage, read_manifest
from mlm_cli.checkpoint.state import (
    KINDS,
    Fragment,
    HasState,
    Position,
    Streams,
    describe_layout,
    is_layout,
    rank_file,
    read_about,
    restore_rng,
)
from mlm_cli.errors import CheckpointError
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.shard import Shard, assemble, slice_full


@dataclass(frozen=True)
class Found:
    """A checkpoint whose files are what the manifest says."""

    folder: Path
    manifest: Manifest


def find_newest(run: RunFolder) -> Found | None:
    """The newest sound checkpoint of a run; older ones are tried when it is damaged, with a warning each. All ranks.

    Raises:
        CheckpointError: there are checkpoints, but every one is damaged.
    """
    reasons: list[str] = []
    for step in reversed(agree.on_rank_zero(run.steps)):
        folder = run.checkpoint(step)
        found, damage = inspect(folder)
        if found is not None:
            for reason in reasons:
                log.warn(f"damaged checkpoint passed over: {reason}")
            if reasons:
                log.warn(f"falling back to {folder.name}")
            return found
        reasons.append(f"{folder.name}: {'; '.join(damage)}")
    if reasons:
        raise CheckpointError(
            f"no checkpoint of {run} is sound:\n  " + "\n  ".join(reasons),
            hint="restore one of these files from a backup, or start anew in another folder with --output",
        )
    return None


def open_checkpoint(folder: Path) -> Found:
    """A checkpoint named by the user, which must be sound. All ranks call.

    Raises:
        CheckpointError: not a checkpoint folder, or damaged.
    """
    found, damage = inspect(folder)
    if found is None:
        raise CheckpointError(f"{folder} cannot be resumed from: {'; '.join(damage)}")
    return found


def inspect(folder: Path) -> tuple[Found | None, list[str]]:
    """Compare a checkpoint with its manifest, the files dealt out over the ranks; all ranks get one answer."""
    rank, ranks = agree.rank(), agree.world_size()
    damage: list[str] = []
    manifest = None
    try:
        manifest = read_manifest(folder)
        damage = find_damage(folder, manifest, part=rank, parts=ranks)
    except CheckpointError as error:
        damage = [error.message.removeprefix(f"{folder}/")]
    if ranks > 1:
        gathered: list[Any] = [None] * ranks
        dist.all_gather_object(gathered, damage)
        damage = sorted({line for lines in gathered for line in lines})
    return (Found(folder, manifest) if manifest is not None and not damage else None), damage


def load_state(found: Found, engine: HasState, streams: Streams | None, parallel: ParallelContext) -> Position:
    """Fill the engine's optimizer state and weights, and the random generators, from a sound checkpoint.

    On the layout that wrote it every rank reads its own file and training goes on bit for bit. On another layout each
    parameter is assembled from the files of all ranks and cut anew; only the dropout masks then differ.

    Raises:
        CheckpointError: the state lacks a parameter or holds it in another shape.
    """
    return agree.all_succeed(lambda: _load_state(found, engine, streams, parallel))


def _load_state(found: Found, engine: HasState, streams: Streams | None, parallel: ParallelContext) -> Position:
    same_layout = is_layout(found.manifest.layout, parallel)
    own = rank_file(parallel.world.rank if same_layout else 0)
    about, handle = read_about(found.folder / own)
    fragments = engine.fragments()
    # A layout may keep its sizes and still share out the optimizer state otherwise (another engine or ZeRO stage).
    if same_layout and all(is_stored_as(fragment, about) for fragment in fragments):
        for fragment in fragments:
            for kind in KINDS if fragment.numel else ():
                fragment.tensors[kind].copy_(handle.get_tensor(f"{kind}/{fragment.name}"))
    else:
        stored = StoredState(found.folder, found.manifest.layout["world"])
        for fragment in fragments:
            stored.fill(fragment, parallel)
    if same_layout:
        restore_rng(about, handle, parallel.device, streams)
    else:
        was = describe_layout(found.manifest.layout)
        log.info(f"{found.folder.name} was written on another layout ({was}): its state was laid out anew")
    engine.updates = int(about["updates"])
    if engine.scaler is not None and about.get("loss_scale"):
        engine.scaler.load(about["loss_scale"])
    engine.refresh()
    return Position(int(about["step"]), int(about["consumed_samples"]), about["extra"])


def is_stored_as(fragment: Fragment, about: dict[str, Any]) -> bool:
    """Does the file that ``about`` is of hold the very part of the parameter that this fragment is?"""
    entry = about["parameters"].get(fragment.name)
    return entry is not None and (entry["start"], entry["numel"], tuple(entry["shape"])) == (
        fragment.start,
        fragment.numel,
        fragment.shape,
    )


class StoredState:
    """The state files of all ranks of a checkpoint, read by parameter, one whole parameter in memory at a time."""

    def __init__(self, folder: Path, world: int) -> None:
        self.folder = folder
        self.ranks = [read_about(folder / rank_file(rank)) for rank in range(world)]
        self.tensor_size = int(self.ranks[0][0]["layout"]["tensor"])

    def full(self, name: str, kind: str) -> Tensor:
        """One kind of state of one parameter, whole, float32.

        Raises:
            CheckpointError: the files of all ranks together do not hold all of it.
        """
        slices: list[Tensor | None] = [None] * self.tensor_size
        shard: Shard | None = None
        seen = [0] * self.tensor_size
        done: set[tuple[int, int]] = set()
        for about, handle in self.ranks:
            entry = about["parameters"].get(name)
            place = int(about["place"]["tensor"])
            if entry is None or entry.get("copy") or not entry["numel"] or (place, entry["start"]) in done:
                continue  # owned elsewhere, or a data-parallel copy of what was read
            done.add((place, entry["start"]))
            part = slices[place]
            if part is None:
                part = slices[place] = torch.empty(entry["shape"])
            stop = entry["start"] + entry["numel"]
            part.view(-1)[entry["start"] : stop] = handle.get_tensor(f"{kind}/{name}")
            seen[place] += entry["numel"]
            shard = None if entry["shard"] is None else Shard(entry["shard"][0], _blocks(entry["shard"][1]))
        wanted = range(self.tensor_size if shard is not None else 1)
        parts = [slices[place] for place in wanted]
        if any(part is None or part.numel() != seen[place] for place, part in zip(wanted, parts, strict=True)):
            raise CheckpointError(f"{self.folder}/state does not hold all of parameter {name} ({kind})")
        return assemble([part for part in parts if part is not None], shard)

    def fill(self, fragment: Fragment, parallel: ParallelContext) -> None:
        """Write this rank's part of a parameter's state into the engine's tensors."""
        for kind in KINDS if fragment.numel else ():
            full = self.full(fragment.name, kind)
            local = slice_full(full, fragment.shard, parallel.tensor.rank, parallel.tensor.size)
            if tuple(local.shape) != fragment.shape:
                raise CheckpointError(
                    f"parameter {fragment.name} has shape {tuple(local.shape)} in {self.folder}/state "
                    f"but {fragment.shape} in the model"
                )
            flat = local.reshape(-1)[fragment.start : fragment.start + fragment.numel]
            fragment.tensors[kind].copy_(flat)


def _blocks(stored: Any) -> tuple[int, ...] | None:
    return None if stored is None else tuple(stored)
