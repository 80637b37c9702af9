"""A mixture of experts from recipe to text: trained, its routing told, resumed at another layout, answering."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlm_cli.checkpoint.hub import read_model_config
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


def test_weights_of_another_run_have_the_experts_of_the_recipe(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """How full and how even they are kept may be changed; having experts or not, and which, may not."""
    words = [f"data.path={data}/book", "train.steps=6", "evaluate.every=0", "log.tensorboard=false", "-q"]
    for spec in ("gpt", "moe"):
        assert run(["pretrain", f"debug/{spec}", *words, f"output={tmp_path / spec}"]) == 0
    for spec, start, keys in (
        ("moe", "gpt", []),
        ("gpt", "moe", []),
        ("moe", "moe", ["model.experts.top_k=1"]),
    ):
        start_from = [f"init_from={tmp_path / start}", f"output={tmp_path / 'other'}"]
        assert run(["pretrain", f"debug/{spec}", *words, *keys, *start_from]) == 2
        assert "model.experts: " in capsys.readouterr().err
    free = ["model.experts.capacity_factor=8", "model.experts.balance_loss=0.5"]
    again = [f"init_from={tmp_path / 'moe'}", f"output={tmp_path / 'again'}"]
    assert run(["pretrain", "debug/moe", *words, *free, *again]) == 0
    experts = read_model_config(tmp_path / "again/step-00000006/model")[0].experts
    assert experts is not None and (experts.capacity_factor, experts.balance_loss) == (8, 0.5)
    assert json.loads((tmp_path / "again/metrics.jsonl").read_text().splitlines()[-1])["dropped"] == 0


def test_what_experts_cannot_do_is_refused(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for keys, said in (
        (["model.experts.num_experts=5", "parallel.tensor=2"], "`model.experts.num_experts` 5 cannot be sliced"),
        (["model.experts.every=9"], "gives none of the 2 layers"),
        (["model.family=bert"], "`model.experts` are for decoders"),
        (["parallel.context=2"], "experts count the tokens of whole samples"),
    ):
        assert run(["pretrain", "debug/moe", f"data.path={data}/book", *keys, "--dry-run", "-q"]) == 2
        assert said in capsys.readouterr().err
