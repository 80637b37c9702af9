"""A mixture of experts from recipe to text: trained, its routing told, resumed at another layout, answering."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlm_cli.cli.app import run
from mlm_cli.config.resolve import resolve_recipe
from mlm_cli.jobs import pretrain


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    source = Path(json.__file__).read_text(encoding="utf-8")
    (folder / "book.txt").write_text(source, encoding="utf-8")
    assert run(["preprocess", str(folder / "book.txt"), "--txt-documents", "line", "--tokenizer", "bytes",
                "--output", str(folder / "book"), "-q"]) == 0  # fmt: skip
    return folder


def _train(rank: int, size: int, data: str, output: str, steps: int, tensor: int) -> int:
    keys = [f"data.path={data}/book", f"train.steps={steps}", f"parallel.tensor={tensor}", "log.tensorboard=false"]
    recipe = resolve_recipe("debug/moe", keys, overlay={"output": output}, verb="pretrain", world_size=size)
    return pretrain.run(recipe)


def test_from_recipe_to_text(
    data: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert _train(0, 1, str(data), str(output), 30, 1) == 0
    assert run_ranks(_train, 2, str(data), str(output), 40, 2) == [0, 0]
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [*range(5, 41, 5)]
    assert records[-1]["loss"] < records[0]["loss"] - 1
    for record in records:
        assert record["busiest_expert"] >= 1 and 0 <= record["dropped"] < 0.5 and record["balance"] > 0.9
    capsys.readouterr()
    words = ["generate", str(output), "--prompt", "def ", "--max-new-tokens", "5", "--temperature", "0", "-q"]
    assert run(words) == 0
    assert len(capsys.readouterr().out.encode()) == 6  # five bytes, whatever they are, and the end of the line


def test_what_experts_cannot_do_is_refused(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for keys, said in (
        (["model.experts.num_experts=5", "parallel.tensor=2"], "`model.experts.num_experts` 5 cannot be sliced"),
        (["model.experts.every=9"], "gives none of the 2 layers"),
        (["model.family=bert"], "`model.experts` are for decoders"),
        (["parallel.context=2"], "experts count the tokens of whole samples"),
    ):
        assert run(["pretrain", "debug/moe", f"data.path={data}/book", *keys, "--dry-run", "-q"]) == 2
        assert said in capsys.readouterr().err
