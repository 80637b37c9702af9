"""Told to stop while loading, evaluating, in the first step or by the clock: saved, code 75, and nothing is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pretrain_runs import fingerprints, make_recipe, metrics, status, write_data

from mlm_cli.checkpoint.folder import RunFolder
from mlm_cli.jobs import pretrain

OBJECTIVE, OPEN_DATA = pretrain.objective, pretrain.open_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("corpus") / "data")


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "run"
    assert pretrain.run(make_recipe(data, run)) == 0
    return run


def ask() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("moment", ["loading", "first step", "evaluation"])
def test_a_signal_at_any_moment(
    moment: str, straight: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlm_cli.models.gpt import GPT

    run, asked = tmp_path / "run", [0]

    def once(inside: bool = True) -> None:
        if inside and not asked[0]:
            asked[0] = 1
            ask()

    if moment == "loading":
        monkeypatch.setattr(pretrain, "open_data", lambda *given: once() or OPEN_DATA(*given))
    elif moment == "first step":
        monkeypatch.setattr(pretrain, "objective", lambda model, batch: once() or OBJECTIVE(model, batch))
    else:
        scores, rounds = GPT.scores, [0]

        def watched(model: Any, batch: Any) -> Any:
            rounds[0] += not model.training
            once(not model.training)
            return scores(model, batch)

        monkeypatch.setattr(GPT, "scores", watched)
    assert pretrain.run(make_recipe(data, run)) == 75
    assert RunFolder(run).steps() == {"loading": [], "first step": [1], "evaluation": [6]}[moment]
    if moment == "evaluation":
        assert rounds[0] == 1  # not to its end
    assert status(run)["state"] == "stopped" and status(run)["exit_code"] == 75
    monkeypatch.undo()
    assert pretrain.run(make_recipe(data, run)) == 0
    assert fingerprints(run / "step-00000012") == fingerprints(straight / "step-00000012")


def _until_the_limit(rank: int, size: int, data: str, folder: str) -> int:
    def slow(model: Any, batch: Any) -> Any:
        time.sleep(0.1)
        return OBJECTIVE(model, batch)

    pretrain.objective = slow  # type: ignore[assignment]
    running = time.clock_gettime(time.CLOCK_BOOTTIME) - _started()
    limit = (running + 25) / 60  # minutes; a busy machine takes more than ten seconds to its first step
    more: dict[str, Any] = {"train__time_limit": limit} if rank == 1 else {}  # one rank's clock is enough
    return pretrain.run(make_recipe(Path(data), Path(folder), train__steps=5000, evaluate__every=0, **more))


def _started() -> float:
    return int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")


def test_the_time_limit_saves_in_time_on_all_ranks(
    data: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    run = tmp_path / "run"
    assert run_ranks(_until_the_limit, 2, str(data), str(run)) == [75, 75]
    (step,) = RunFolder(run).steps()
    assert 1 < step < 5000 and metrics(run)[-1]["step"] == step
    assert status(run)["message"] == "time limit" and status(run)["exit_code"] == 75
