"""``results.json`` in the shape that lm-evaluation-harness writes, and the same as a table.

Its readers find here what they look for: ``results[task]["METRIC,none"]`` and ``["METRIC_stderr,none"]`` ("none" is the
harness's name for "no filter"; a missing error is ``"N/A"``), ``configs``, ``versions``, ``n-shot``, ``n-samples``,
``higher_is_better``, ``config``, ``date``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlm_cli import __version__
from mlm_cli.errors import ResourceError

_NUMERIC = (3, 5, 6)  # columns of the table


@dataclass(frozen=True)
class TaskResult:
    """What one task gave. ``stderr`` has an entry for each metric; None: not known.

    A metric that was taken after a filter of the harness is named ``METRIC,FILTER``. ``members``: tasks of a group.
    """

    name: str
    metrics: Mapping[str, float]
    stderr: Mapping[str, float | None]
    higher_is_better: Mapping[str, bool]
    config: Mapping[str, Any] = field(default_factory=dict)
    version: int = 1
    num_samples: int = 0
    num_original: int = 0
    num_fewshot: int = 0
    members: tuple[str, ...] = ()


def standard_error(values: np.ndarray) -> float | None:
    """Of the mean of independent ``values``; None where there is but one."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def results_document(
    tasks: Sequence[TaskResult], *, config: Mapping[str, Any], model_name: str, started: float, seconds: float
) -> dict[str, Any]:
    """The whole document as plain values.

    Args:
        config: how the model was run (``model``, ``model_args``, ``batch_size``, ``device``, ...).
        started: seconds since the epoch.
        seconds: time the evaluation took.
    """
    return {
        "results": {task.name: _entry(task) for task in tasks},
        "group_subtasks": {task.name: list(task.members) for task in tasks},
        "configs": {task.name: {"task": task.name, **task.config} for task in tasks},
        "versions": {task.name: task.version for task in tasks},
        "n-shot": {task.name: task.num_fewshot for task in tasks},
        "higher_is_better": {task.name: dict(task.higher_is_better) for task in tasks},
        "n-samples": {task.name: {"original": task.num_original, "effective": task.num_samples} for task in tasks},
        "config": dict(config),
        "git_hash": None,
        "date": started,
        "mlm_version": __version__,
        "model_source": "mlm",
        "model_name": model_name,
        "model_name_sanitized": model_name.strip("/").replace("/", "__"),
        "total_evaluation_time_seconds": str(seconds),
    }


def _entry(task: TaskResult) -> dict[str, Any]:
    entry: dict[str, Any] = {"alias": task.name}
    for metric, value in task.metrics.items():
        error = task.stderr.get(metric)
        name, _, filtered = metric.partition(",")
        filtered = filtered or "none"
        entry[f"{name},{filtered}"] = value if math.isfinite(value) else str(value)
        entry[f"{name}_stderr,{filtered}"] = error if error is not None and math.isfinite(error) else "N/A"
    return entry


def json_lines(records: Iterable[Mapping[str, Any]]) -> str:
    """A line of JSON for each record."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_results(document: Mapping[str, Any], path: Path) -> None:
    """Write the document, whole or not at all.

    Raises:
        ResourceError: the folder cannot be written.
    """
    _write(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_texts(texts: Mapping[str, str], folder: Path) -> None:
    """Write texts by file name, each whole or not at all.

    Raises:
        ResourceError: the folder cannot be written.
    """
    for name, text in texts.items():
        _write(folder / name, text)


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise ResourceError(f"cannot write {path}: {error.strerror or error}") from None


def results_table(document: Mapping[str, Any]) -> str:
    """The results as the harness prints them, in Markdown: task, metric, value, error. As wide as it needs to be."""
    rows = [("task", "metric", "", "value", "", "stderr", "samples")]
    for name, entry in document["results"].items():
        shown, samples = name, str(document["n-samples"][name]["effective"])
        for key, value in entry.items():
            metric, comma, tail = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            arrow = "↑" if document["higher_is_better"][name].get(metric) else "↓"
            error = entry[f"{metric}_stderr,{tail}"]
            label = metric if tail == "none" else f"{metric} ({tail})"
            rows.append((shown, label, arrow, _number(value), "±", _number(error), samples))
            shown = samples = ""  # said once a task
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_row(row, widths) for row in rows]
    rule = "|".join("-" * (width + 1) + (":" if at in _NUMERIC else "-") for at, width in enumerate(widths))
    return "\n".join([document["model_name"], "", lines[0], f"|{rule}|", *lines[1:]])


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    placed = [
        f"{cell:>{width}}" if at in _NUMERIC else f"{cell:<{width}}"
        for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return f"| {' | '.join(placed)} |"


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3e}"
