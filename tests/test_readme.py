"""The README's commands, run in order as a newcomer would: in an empty folder with a book and two labelled files."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def commands() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_text: Path) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    texts = [json.loads(line)["text"] for line in tiny_text.read_text(encoding="utf-8").splitlines()]
    (folder / "book.txt").write_text("\n".join(texts), encoding="utf-8")
    for name, count in (("train.tsv", 60), ("dev.tsv", 20)):
        rows = [f"a {'good' if n % 2 else 'bad'} day number {n}\t{n % 2}" for n in range(count)]
        (folder / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def test_readme_has_all_five_verbs() -> None:
    verbs = {shlex.split(command)[1] for command in commands()}
    assert {"preprocess", "pretrain", "finetune", "evaluate", "generate"} <= verbs


def test_every_command_of_the_readme_works(workplace: Path) -> None:
    for command in commands():
        program, *arguments = shlex.split(command)
        assert program == "mlm"
        done = subprocess.run(
            [sys.executable, "-m", "mlm_cli", *arguments],
            cwd=workplace,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout}\n{done.stderr}"
    assert (workplace / "runs/book/latest").read_text().strip() == "step-00000060"
    scores = json.loads((workplace / "runs/mood/evaluate/results.json").read_text())
    assert scores["results"]["classification"]["accuracy,none"] >= 0.5
