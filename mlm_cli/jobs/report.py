"""The body of ``mlm report``: what ``metrics.jsonl`` of one or more runs tells, as text and as pictures."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mlm_cli import log
from mlm_cli.checkpoint.folder import write_atomic
from mlm_cli.config.tasks import TASK_KINDS
from mlm_cli.errors import DataError, UsageError

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 60  # characters of a curve in the terminal
# Curves that are drawn, and how their axes are called. Scores of evaluations come behind, under their own names.
_CURVES = {
    "loss": "training loss (nats)",
    "valid_loss": "validation loss (nats)",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "tokens_per_s": "tokens a second",
}
_SCORES = ("valid_", "dev_")
_MEASURES = frozenset(metric for kind in TASK_KINDS.values() for metric in kind.metrics)  # more is better


@dataclass(frozen=True)
class Run:
    """One run folder: its records in order of steps, and what ``status.json`` says (empty without one)."""

    name: str
    folder: Path
    records: list[dict[str, Any]]
    status: dict[str, Any]

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of the records that have a finite ``key``."""
        found = [
            (record["step"], float(record[key]))
            for record in self.records
            if isinstance(record.get(key), int | float) and math.isfinite(record[key])
        ]
        return [step for step, _ in found], [value for _, value in found]


def read_run(path: str) -> Run:
    """A run folder's records.

    Raises:
        UsageError: not a run folder.
        DataError: a line of ``metrics.jsonl`` that is not a record, other than an unfinished last one.
    """
    folder = Path(path)
    source = folder / "metrics.jsonl"
    if not source.is_file():
        raise UsageError(
            f"{folder} is not a run folder: it has no metrics.jsonl", hint="name the `output` of pretrain or finetune"
        )
    records: list[dict[str, Any]] = []
    lines = source.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break  # the run is writing it at this moment
            raise DataError(f"{source}:{number} is not JSON") from None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise DataError(f"{source}:{number} is not a record with a `step`")
        records.append(record)
    if not records:
        raise DataError(f"{source} holds no records yet", hint="the first one comes after `log.every` steps")
    return Run(folder.name, folder, records, _read_status(folder / "status.json"))


def _read_status(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def curve_names(runs: Sequence[Run]) -> list[str]:
    """The curves that any of the runs has, in a fixed order."""
    keys = {key for run in runs for record in run.records for key, value in record.items() if value is not None}
    scores = sorted(key for key in keys if key.startswith(_SCORES) and key not in _CURVES)
    return [key for key in (*_CURVES, *scores) if key in keys]


def summary(run: Run) -> dict[str, Any]:
    """Where a run stands: first, last and best value of each curve, and its usual speed."""
    curves = {}
    for key in curve_names([run]):
        steps, values = run.curve(key)
        if not values:
            continue
        best = max if _more_is_better(key) else min
        place = values.index(best(values))
        curves[key] = {"first": values[0], "last": values[-1], "best": values[place], "best_step": steps[place]}
    _, speeds = run.curve("tokens_per_s")
    _, mfu = run.curve("mfu")
    return {
        "run": str(run.folder),
        "state": run.status.get("state"),
        "step": run.records[-1]["step"],
        "steps": run.status.get("steps"),
        "tokens": run.records[-1].get("tokens"),
        "tokens_per_s": statistics.median(speeds) if speeds else None,
        "mfu": statistics.median(mfu) if mfu else None,
        "curves": curves,
    }


def _more_is_better(key: str) -> bool:
    """``dev_f1``, ``valid_binary_accuracy``, ``tokens_per_s``; less is better of losses."""
    return key == "tokens_per_s" or key.endswith(tuple(f"_{metric}" for metric in _MEASURES))


def as_text(runs: Sequence[Run]) -> str:
    """A table of where the runs stand, and the main curves in characters."""
    lines = []
    for run in runs:
        about = summary(run)
        speed = f" · {about['tokens_per_s']:,.0f} tokens/s" if about["tokens_per_s"] else ""
        mfu = f" · MFU {about['mfu']:.0%}" if about["mfu"] else ""
        of = f"/{about['steps']:,}" if about["steps"] else ""
        lines.append(f"{run.folder}: {about['state'] or 'unknown'}, step {about['step']:,}{of}{speed}{mfu}")
        for key, values in about["curves"].items():
            if key not in ("lr", "grad_norm", "tokens_per_s"):
                numbers = f"{values['first']:.4f} -> {values['last']:.4f}, best {values['best']:.4f}"
                lines.append(f"  {key:<16} {sparkline(run.curve(key)[1])}  {numbers} at step {values['best_step']:,}")
    return "\n".join(lines)


def sparkline(values: Sequence[float], width: int = _WIDTH) -> str:
    """A curve in block characters, at most ``width`` of them, each the mean of its share of the values."""
    count = min(width, len(values))
    cuts = [round(i * len(values) / count) for i in range(count + 1)]
    means = [statistics.fmean(values[a:b]) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def smoothed(values: Sequence[float], share: float) -> list[float]:
    """Running mean that keeps ``share`` of the past, unbiased at its start (Kingma and Ba 2015, section 3)."""
    out, mean = [], 0.0
    for number, value in enumerate(values, 1):
        mean = share * mean + (1 - share) * value
        out.append(mean / (1 - share**number))
    return out


def write_report(runs: Sequence[Run], output: str, *, smooth: float = 0.0) -> None:
    """``report.md`` and a picture for each curve, in the folder ``output``.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UsageError("pictures need matplotlib", hint="pip install matplotlib, or leave out --output") from None
    matplotlib.use("Agg")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    summaries = [summary(run) for run in runs]
    parts = ["# Report", "", *_table_of_runs(summaries)]
    for key in curve_names(runs):
        if not any(key in about["curves"] for about in summaries):
            continue
        _draw(runs, key, folder / f"{key}.png", smooth)
        parts += ["", f"## {_CURVES.get(key, key)}", "", f"![{key}]({key}.png)", ""]
        parts += ["| run | first | last | best | at step |", "|---|---|---|---|---|"]
        for run, about in zip(runs, summaries, strict=True):
            if (values := about["curves"].get(key)) is not None:
                numbers = " | ".join(f"{values[name]:.5g}" for name in ("first", "last", "best"))
                parts.append(f"| {run.name} | {numbers} | {values['best_step']:,} |")
    write_atomic(folder / "report.md", "\n".join(parts) + "\n")
    log.info(f"{folder / 'report.md'} written")


def _table_of_runs(summaries: Sequence[dict[str, Any]]) -> list[str]:
    rows = ["| run | state | step | tokens/s | MFU |", "|---|---|---|---|---|"]
    for about in summaries:
        cells = (
            about["run"],
            about["state"] or "unknown",
            f"{about['step']:,}",
            f"{about['tokens_per_s']:,.0f}" if about["tokens_per_s"] else "",
            f"{about['mfu']:.0%}" if about["mfu"] else "",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _draw(runs: Sequence[Run], key: str, path: Path, smooth: float) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        steps, values = run.curve(key)
        marker = "." if len(steps) < 50 else None
        if smooth and len(values) > 2 and key != "lr":
            (line,) = axes.plot(steps, smoothed(values, smooth), label=run.name)
            axes.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=0.8)
        else:
            axes.plot(steps, values, label=run.name, marker=marker)
    axes.set_xlabel("step")
    axes.set_ylabel(_CURVES.get(key, key))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
