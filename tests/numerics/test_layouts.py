"""Whatever the layout, the model learned is the same: the table of docs/layouts.md, held."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layout_rows import PAGE, REFERENCES, ROWS, distance, family_of, run_rows, runs_of, ways, write_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., list[Any]]) -> Path:
    """Data, and the run of one rank."""
    path = tmp_path_factory.mktemp("layouts")
    run_ranks(run_rows, 1, write_data(path / "data"), str(path), REFERENCES)
    return path


def _in_the_quick_run(name: str, how: str) -> bool:
    """Two ranks: every kind of layout of a GPT, and of the other families one or two, recomputed."""
    if family_of(name) == "gpt":
        return how == "none" and name not in ("c2 zero 3", "d2 zero 2")
    return how == "full" and name in ("t5 p2", "t5 d2 zero 1", "bert t2 sequence", "experts t2 sequence")


_TWO = runs_of(2)
_GROUPS = {
    "2": (2, [run for run in _TWO if _in_the_quick_run(*run)]),
    "2, more": (2, [run for run in _TWO if not _in_the_quick_run(*run)]),
    "4": (4, runs_of(4)),
    "8": (8, runs_of(8)),
}


# Runs of one number of ranks share their processes, whose start takes longer than the runs.
@pytest.mark.parametrize(
    "group", ["2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("2, more", "4", "8"))]
)
def test_the_same_model_is_learned(group: str, folder: Path, run_ranks: Callable[..., list[Any]]) -> None:
    size, runs = _GROUPS[group]
    run_ranks(run_rows, size, str(folder / "data"), str(folder), runs, timeout=900.0)
    for name, how in runs:
        apart = distance(folder, name, how)
        assert apart.loss < 1e-5 and apart.grad_norm < 1e-5 and apart.weights < 1e-4, f"{name}, {how}: {apart}"


def test_the_page_has_every_row() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, (ranks, _) in ROWS.items():
        for how in ways(name):
            assert f"| {name} | {ranks} | {how} |" in text, "run `python tests/numerics/layout_rows.py`"
