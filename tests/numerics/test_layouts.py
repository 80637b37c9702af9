"""Whatever the layout, the model learned is the same: the table of docs/layouts.md, held."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layout_rows import PAGE, REFERENCES, ROWS, distance, run_rows, ways, write_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., list[Any]]) -> Path:
    """Data, and the run of one rank."""
    path = tmp_path_factory.mktemp("layouts")
    run_ranks(run_rows, 1, write_data(path / "data"), str(path), list(REFERENCES))
    return path


# Rows of one number of ranks share their processes, whose start takes longer than the runs.
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)])
def test_the_same_model_is_learned(ranks: int, folder: Path, run_ranks: Callable[..., list[Any]]) -> None:
    names = [name for name, (size, _) in ROWS.items() if size == ranks]
    run_ranks(run_rows, ranks, str(folder / "data"), str(folder), names, timeout=900.0)
    for name in names:
        for how in ways(name):
            apart = distance(folder, name, how)
            assert apart.loss < 1e-5 and apart.grad_norm < 1e-5 and apart.weights < 1e-4, f"{name}, {how}: {apart}"


def test_the_page_has_every_row() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, (ranks, _) in ROWS.items():
        for how in ways(name):
            assert f"| {name} | {ranks} | {how} |" in text, "run `python tests/numerics/layout_rows.py`"
