"""`mlm report`: numbers and curves are those of metrics.jsonl, also while a run is writing it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlm_cli.errors import DataError, UsageError
from mlm_cli.jobs.report import as_text, curve_names, read_run, smoothed, sparkline, summary, write_report


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "bert"
    folder.mkdir()
    records = [
        {"step": step, "loss": 8.0 - step, "tokens_per_s": 100.0 * step, "mfu": None, "tokens": 10 * step}
        for step in range(1, 6)
    ]
    records[1].update(valid_loss=6.5, valid_accuracy=0.1)
    records[3].update(valid_loss=4.5, valid_accuracy=0.4, loss=None)
    records[4].update(valid_loss=4.75, valid_accuracy=0.3)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "status.json").write_text(json.dumps({"state": "running", "steps": 9}))
    return folder


def test_summary(run: Path) -> None:
    about = summary(read_run(str(run)))
    assert (about["state"], about["step"], about["steps"], about["tokens"]) == ("running", 5, 9, 50)
    assert about["tokens_per_s"] == 300.0 and about["mfu"] is None
    assert about["curves"]["loss"] == {"first": 7.0, "last": 3.0, "best": 3.0, "best_step": 5}
    assert about["curves"]["valid_loss"] == {"first": 6.5, "last": 4.75, "best": 4.5, "best_step": 4}
    assert about["curves"]["valid_accuracy"] == {"first": 0.1, "last": 0.3, "best": 0.4, "best_step": 4}
    assert curve_names([read_run(str(run))]) == ["loss", "valid_loss", "tokens_per_s", "valid_accuracy"]
    text = as_text([read_run(str(run))])
    assert "running, step 5/9 · 300 tokens/s" in text and "6.5000 -> 4.7500, best 4.5000 at step 4" in text


@pytest.mark.parametrize("metric", ["accuracy", "f1", "exact_match", "pearson", "spearman", "precision", "recall"])
def test_of_a_tasks_measures_more_is_better(run: Path, metric: str) -> None:
    records = [
        {"step": step, f"dev_{metric}": value, "dev_loss": value} for step, value in ((1, 0.2), (2, 0.7), (3, 0.6))
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    curves = summary(read_run(str(run)))["curves"]
    assert (curves[f"dev_{metric}"]["best"], curves["dev_loss"]["best"]) == (0.7, 0.2)


def test_a_line_that_is_being_written_is_left_out(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert read_run(str(run)).records[-1]["step"] == 5


def test_bad_input(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a run folder"):
        read_run(str(tmp_path))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([lines[0], "{oops\n", *lines[1:]]))
    with pytest.raises(DataError, match=r"metrics.jsonl:2 is not JSON"):
        read_run(str(run))
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="no records yet"):
        read_run(str(run))


def test_pictures(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_report([read_run(str(run))], str(tmp_path / "report"), smooth=0.5)
    page = (tmp_path / "report" / "report.md").read_text()
    for key in ("loss", "valid_loss", "tokens_per_s", "valid_accuracy"):
        assert f"![{key}]({key}.png)" in page
        assert (tmp_path / "report" / f"{key}.png").read_bytes().startswith(b"\x89PNG")
    assert "| bert | 6.5 | 4.75 | 4.5 | 4 |" in page


def test_curves_in_characters() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([3, 3]) == "▁▁"
    assert len(sparkline(range(1000))) == 60


def test_smoothing_has_no_bias_at_its_start() -> None:
    assert smoothed([5.0] * 4, 0.9) == pytest.approx([5.0] * 4)
    assert smoothed([1.0, 2.0], 0.0) == [1.0, 2.0]
