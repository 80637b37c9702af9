"""The shape of the project itself: file lengths, names that explain nothing, what start-up may import."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from graphlib import TopologicalSorter
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


def test_no_file_imports_another_in_a_circle() -> None:
    """Imports inside functions and for types alone count too: the floors do not tell them apart, nor do readers."""
    files = [path for path in SOURCES if path.is_relative_to(ROOT / "mlm_cli") and path.suffix == ".py"]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        named = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        pairs = [(f"{node.module}.{name.name}", str(node.module)) for node in named for name in node.names]
        found = {inner if inner in modules else outer for inner, outer in pairs}
        graph[module] = (found & modules.keys()) - {module}
    assert sum(map(len, graph.values())) > 500
    TopologicalSorter(graph).prepare()  # CycleError names the circle


@pytest.mark.parametrize("module", ["mlm_cli.cli.app", "mlm_cli.jobs.preprocess", "mlm_cli.config.resolve"])
def test_start_up_is_light(module: str) -> None:
    """Commands that only parse, check or tokenise must not pay for torch."""
    script = (
        f"import sys, {module}; print(sorted({{'torch', 'transformers', 'deepspeed', 'datasets'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_benchmarks_import_what_is_there() -> None:
    """They are run by hand, and import inside functions: a name that has moved would show only then."""
    named = [
        (path.name, node.module, name.name)
        for path in (ROOT / "benchmarks").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlm_cli")
        for name in node.names
    ]
    lost = []
    for file, module, name in named:
        if not hasattr(importlib.import_module(str(module)), name):
            try:
                importlib.import_module(f"{module}.{name}")
            except ModuleNotFoundError:
                lost.append(f"{file}: {module}.{name}")
    assert len(named) > 20 and not lost
