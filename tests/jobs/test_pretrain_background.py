"""Checkpoints written while training goes on: the same bits, in the same order, and an error ends the run in time."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pretrain_runs import fingerprints, losses, make_recipe, metrics, status, write_data

from mlm_cli import distributed
from mlm_cli.checkpoint import state
from mlm_cli.checkpoint.folder import RunFolder
from mlm_cli.checkpoint.load import inspect
from mlm_cli.errors import ResourceError
from mlm_cli.jobs import pretrain

WRITE = state.write_tensors


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("corpus") / "data")


def test_training_goes_on_meanwhile_and_the_order_of_safety_stays(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    seen: list[tuple[int, list[int], str | None]] = []
    real = pretrain.objective

    def slow_disk(*given: Any) -> Any:
        """The first checkpoint is not written before training has gone three steps further."""
        deadline = time.monotonic() + 60
        while not RunFolder(run).steps() and seen[-1][0] < 11 and time.monotonic() < deadline:
            time.sleep(0.01)
        return WRITE(*given)

    def watch(model: Any, batch: Any) -> Any:
        latest = run / "latest"
        seen.append(
            (
                int(batch["sample_ids"][0]) // 4 + 1,
                RunFolder(run).steps(),
                latest.read_text().strip() if latest.exists() else None,
            )
        )
        return real(model, batch)

    monkeypatch.setattr(state, "write_tensors", slow_disk)
    monkeypatch.setattr(pretrain, "objective", watch)
    changes = {"checkpoint__every": 8, "train__steps": 24, "evaluate__every": 0, "checkpoint__keep_last": 1}
    assert pretrain.run(make_recipe(data, run, **changes)) == 0
    assert any(step == 11 and steps == [] for step, steps, _ in seen)
    for _, steps, latest in seen:
        assert latest is None or RunFolder(run).checkpoint(int(latest[5:])).name == latest
        assert len(steps) <= 1 and (latest is None or int(latest[5:]) in steps)
    told = [record for record in metrics(run) if "checkpoint_blocked" in record]
    assert told and told[0]["checkpoint_blocked"] < told[0]["checkpoint_seconds"]
    assert RunFolder(run).steps() == [24] and inspect(run / "step-00000024")[1] == []

    waiting = tmp_path / "waiting" / "run"
    monkeypatch.undo()
    assert pretrain.run(make_recipe(data, waiting, checkpoint__background=False, **changes)) == 0
    assert fingerprints(waiting / "step-00000024") == fingerprints(run / "step-00000024")
    assert losses(waiting) == losses(run)


def test_an_error_in_the_background_ends_the_run_with_its_code(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def full(*given: Any) -> Any:
        if (run / "step-00000004").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return WRITE(*given)

    monkeypatch.setattr(state, "write_tensors", full)
    with pytest.raises(ResourceError, match="disk full while writing"):
        pretrain.run(make_recipe(data, run, checkpoint__every=4, train__steps=1000))
    assert RunFolder(run).steps() == [4] and status(run)["exit_code"] == 7
    assert metrics(run)[-1]["step"] < 20 and not list(run.glob(".tmp*"))


def _on_ranks(rank: int, size: int, data: str, folder: str) -> list[list[int]]:
    distributed.shutdown = lambda: None  # type: ignore[assignment]

    def slower_than_the_other(*given: Any) -> Any:
        time.sleep(0.3 * rank)
        return WRITE(*given)

    state.write_tensors = slower_than_the_other  # type: ignore[assignment]
    found = []
    for name, layout in (("tensor", {"tensor": 2}), ("zero", {"zero": 1})):
        for background in (True, False):
            run = Path(folder) / name / str(background) / "run"
            changes = {"checkpoint__every": 3, "checkpoint__background": background, "parallel": layout}
            assert pretrain.run(make_recipe(Path(data), run, **changes)) == 0
            found.append(RunFolder(run).steps())
    return found


def test_ranks_that_write_at_different_speed(data: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    assert run_ranks(_on_ranks, 2, str(data), str(tmp_path)) == [[[3, 6, 9, 12]] * 4] * 2
    for name in ("tensor", "zero"):
        for step in (3, 6, 9, 12):
            one, two = (tmp_path / name / str(way) / "run" / f"step-{step:08d}" for way in (True, False))
            assert fingerprints(one) == fingerprints(two) and inspect(one)[1] == []
