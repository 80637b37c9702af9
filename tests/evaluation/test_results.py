"""``results.json``: the keys that readers of lm-evaluation-harness files look for."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mlm_cli.errors import ResourceError
from mlm_cli.evaluation.results import TaskResult, results_document, results_table, write_results


def make_document() -> dict:
    tasks = [
        TaskResult(
            "perplexity",
            {"word_perplexity": 20.5, "byte_perplexity": math.inf},
            {"word_perplexity": 0.25, "byte_perplexity": None},
            {"word_perplexity": False, "byte_perplexity": False},
            {"stride": 32},
            num_samples=7,
            num_original=9,
        ),
        TaskResult("classification", {"accuracy": 0.75}, {"accuracy": 0.02}, {"accuracy": True}, num_samples=100),
    ]
    config = {"model": "mlm", "batch_size": 8}
    return results_document(tasks, config=config, model_name="runs/a", started=1.7e9, seconds=2.5)


def test_shape_of_the_harness() -> None:
    """Top-level keys and key spelling of a results file written by lm-evaluation-harness 0.4."""
    document = make_document()
    for key in (
        "results",
        "group_subtasks",
        "configs",
        "versions",
        "n-shot",
        "higher_is_better",
        "n-samples",
        "config",
    ):
        assert key in document
    assert document["results"]["perplexity"] == {
        "alias": "perplexity",
        "word_perplexity,none": 20.5,
        "word_perplexity_stderr,none": 0.25,
        "byte_perplexity,none": "inf",
        "byte_perplexity_stderr,none": "N/A",
    }
    assert document["n-samples"]["perplexity"] == {"original": 9, "effective": 7}
    assert document["configs"]["perplexity"] == {"task": "perplexity", "stride": 32}
    assert document["git_hash"] is None and document["date"] == 1.7e9
    json.dumps(document, allow_nan=False)


def test_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_results(make_document(), tmp_path / "new" / "results.json")
    assert json.loads((tmp_path / "new" / "results.json").read_text()) == make_document()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["results.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write"):
        write_results(make_document(), tmp_path / "file" / "results.json")


def test_table_has_a_row_for_each_metric() -> None:
    lines = results_table(make_document()).splitlines()
    text = "\n".join(lines)
    assert "word_perplexity" in text and "20.5000" in text and "N/A" in text and "accuracy" in text
    assert len({len(line) for line in lines[2:]}) == 1 and lines[3].strip("|-:") != lines[3]
    assert [line.count("|") for line in lines[2:]] == [8] * len(lines[2:])
