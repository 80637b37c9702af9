"""The README's commands, run in order as a newcomer would: in an empty folder with a book and two labelled files."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
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
    quiz = [{"context": f"import {name}", "choices": ["as", "from", "json"], "label": 0} for name in ("re", "sys")]
    (folder / "quiz.jsonl").write_text("".join(json.dumps(question) + "\n" for question in quiz), encoding="utf-8")
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
    ask_the_server(workplace)


def ask_the_server(workplace: Path) -> None:
    """The two lines on ``--serve``, with any port that is free."""
    pytest.importorskip("uvicorn")
    [block] = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    serve, curl = block.splitlines()
    arguments = [*shlex.split(serve.removesuffix(" &"))[1:-1], "0"]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlm_cli", *arguments],
        cwd=workplace,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        ask(server, curl)
    finally:
        server.kill()
        server.wait()


def ask(server: subprocess.Popen[str], curl: str) -> None:
    assert server.stderr is not None
    said = ""
    while not (found := re.search(r"answers POST (\S+);", said)):
        line = server.stderr.readline()
        assert line, said
        said += line
    words = shlex.split(curl)
    assert words[1].endswith(":8000/v1/completions")
    request = urllib.request.Request(found.group(1), words[-1].encode(), dict([words[3].split(": ")]))
    with urllib.request.urlopen(request, timeout=60) as reply:
        document = json.loads(reply.read())
    assert 0 < document["usage"]["completion_tokens"] <= 20 and document["choices"][0]["text"]
    server.send_signal(signal.SIGINT)
    assert server.wait(timeout=30) == 0
    server.stderr.close()
