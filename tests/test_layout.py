"""The shape of the project itself: file lengths, names that explain nothing, what start-up may import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path
    for folder in ("mlm_cli", "csrc", "benchmarks", "recipes", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}
)


def test_files_stay_readable() -> None:
    long = {str(path.relative_to(ROOT)): n for path in SOURCES if (n := len(path.read_text().splitlines())) > 400}
    assert not long, f"files past 400 lines: {long}"


def test_names_explain() -> None:
    empty = {"utils", "util", "common", "helpers", "helper", "misc"}
    bad = [str(path.relative_to(ROOT)) for path in SOURCES if empty & {path.stem, *path.relative_to(ROOT).parts[:-1]}]
    assert not bad


@pytest.mark.parametrize("module", ["mlm_cli.cli.app", "mlm_cli.jobs.preprocess", "mlm_cli.config.resolve"])
def test_start_up_is_light(module: str) -> None:
    """Commands that only parse, check or tokenise must not pay for torch."""
    script = (
        f"import sys, {module}; print(sorted({{'torch', 'transformers', 'deepspeed', 'datasets'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
