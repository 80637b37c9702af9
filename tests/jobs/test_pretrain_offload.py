"""Optimizer state on a disk trains the same model, bit for bit, as in memory, and goes on from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain_runs import fingerprints, losses, make_recipe, write_data

from mlm_cli import distributed
from mlm_cli.jobs import pretrain
from mlm_cli.training.disk_state import DiskState


def _on_a_disk(rank: int, size: int, data: str, folder: str) -> list[int]:
    """Values that lie on a disk: none in the first run, a half of the state in each of the two others."""
    distributed.shutdown = lambda: None  # type: ignore[assignment]
    place, zeros = Path(folder), DiskState.zeros
    counts = []
    for name, offload, steps in (("memory", "cpu", 6), ("disk", "nvme", 3), ("disk", "nvme", 6)):
        made: list[int] = []
        DiskState.zeros = lambda self, numel, made=made: (made.append(numel), zeros(self, numel))[1]  # type: ignore[assignment,method-assign,misc]
        parallel = {"zero": 3, "offload": offload, "offload_folder": str(place / "nvme")}
        recipe = make_recipe(Path(data), place / name, parallel=parallel, train__precision="bf16", train__steps=steps)
        assert pretrain.run(recipe) == 0
        counts.append(sum(made))
    return counts


def test_a_disk_changes_no_bit(tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    data = write_data(tmp_path / "data")
    for none, *halves in run_ranks(_on_a_disk, 2, str(data), str(tmp_path)):
        assert none == 0
        assert all(3 * 29_056 / 2 <= numel < 3 * 29_056 / 2 * 1.01 for numel in halves)  # and the padding of shares
    ends = [fingerprints(tmp_path / name / "step-00000006") for name in ("memory", "disk")]
    cards = [end.pop("model/README.md") for end in ends]  # they hold the recipe
    assert ends[0] == ends[1] and len(ends[0]) > 4 and cards[0] != cards[1]
    assert losses(tmp_path / "disk") == losses(tmp_path / "memory")
    assert list((tmp_path / "nvme").iterdir()) == []
