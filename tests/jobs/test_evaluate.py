"""``mlm evaluate`` as a job: results file, table or JSON, any layout, and mistakes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mlm_cli.checkpoint.hub import save_model_folder
from mlm_cli.config.requests import EvaluateRequest
from mlm_cli.config.schema import ModelSection, Recipe
from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.errors import CheckpointError, DataError, UsageError
from mlm_cli.jobs import finetune
from mlm_cli.jobs.evaluate import run
from mlm_cli.models.registry import build_gpt
from mlm_cli.parallel.context import ParallelContext

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen.\n" * 5


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random language model over bytes."""
    folder = tmp_path_factory.mktemp("lm")
    tokenizer = load_tokenizer("bytes")
    section = ModelSection(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        seq_length=48,
        vocab_size=tokenizer.vocab_size,
        init_std=0.1,
    )
    save_model_folder(build_gpt(section, ParallelContext.single(), seed=5), folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def classifier(lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a short fine-tuning; its best checkpoint is not its latest."""
    folder = tmp_path_factory.mktemp("classifier")
    rows = [("good film", "yes"), ("bad film", "no"), ("good", "yes"), ("bad", "no")]
    (folder / "data.tsv").write_text("sentence\tverdict\n" + "".join(f"{a}\t{b}\n" for a, b in rows * 4))
    task = {
        "train": str(folder / "data.tsv"),
        "dev": str(folder / "data.tsv"),
        "text_column": "sentence",
        "label_column": "verdict",
    }
    recipe = Recipe(
        init_from=str(lm),
        task=task,  # type: ignore[arg-type]
        train={"steps": 30, "micro_batch_size": 8, "precision": "fp32"},  # type: ignore[arg-type]
        optimizer={"lr": 3e-3},  # type: ignore[arg-type]
        checkpoint={"every": 0},  # type: ignore[arg-type]
        evaluate={"every": 10},  # type: ignore[arg-type]
        log={"tensorboard": False},  # type: ignore[arg-type]
        output=str(folder / "run"),
    )
    assert finetune.run(recipe) == 0
    return folder


def test_json_is_one_document_with_the_numbers_of_transformers(
    lm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "held.txt").write_text(TEXT)
    request = EvaluateRequest(
        str(lm), ("perplexity",), (str(tmp_path / "held.txt"),), stride=48, output=str(tmp_path / "out"), format="json"
    )
    assert run(request) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == document
    results = document["results"]["perplexity"]

    model = transformers.AutoModelForCausalLM.from_pretrained(lm).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(lm)
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(TEXT)["input_ids"]]])
    total = 0.0
    with torch.no_grad():
        for begin in range(0, ids.shape[1] - 1, 48):
            inputs, labels = ids[:, begin : begin + 48], ids[:, begin + 1 : begin + 49]
            logits = model(inputs).logits[:, : labels.shape[1]]
            total += float(torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum"))
    num_bytes = len(TEXT.encode())
    assert results["bits_per_byte,none"] == pytest.approx(total / num_bytes / math.log(2), rel=1e-5)
    assert results["token_perplexity,none"] == pytest.approx(math.exp(total / num_bytes), rel=1e-5)
    assert document["configs"]["perplexity"]["num_scored_tokens"] == num_bytes
    assert document["n-samples"]["perplexity"] == {"original": 1, "effective": 1}
    assert document["config"]["model_dtype"] == "float32"


def test_text_is_a_table_on_stdout(lm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "held.txt").write_text(TEXT)
    assert run(EvaluateRequest(str(lm), ("perplexity",), (str(tmp_path / "held.txt"),))) == 0
    captured = capsys.readouterr()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in captured.out.splitlines() if "|" in line]
    assert [row[1] for row in rows[2:]] == [
        "loss", "token_perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte",
    ]  # fmt: skip
    assert all(float(row[3]) > 0 for row in rows[2:]) and "|" not in captured.err
    assert not (lm / "evaluate").exists()  # not a run folder: nothing is written into it


def test_a_fine_tuned_run_is_scored_at_its_best(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Columns and file come from the run's own recipe; accuracy is the one its manifest has."""
    run_folder = classifier / "run"
    assert run(EvaluateRequest(str(run_folder), ("classification",), format="json")) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    best = (run_folder / "best").read_text().strip()
    assert best in captured.err and best in document["config"]["model_args"]
    manifest = json.loads((run_folder / best / "manifest.json").read_text())
    results = document["results"]["classification"]
    assert results["accuracy,none"] == manifest["metrics"]["dev_accuracy"]
    assert results["f1,none"] == manifest["metrics"]["dev_f1"]
    assert results["loss,none"] == pytest.approx(manifest["metrics"]["dev_loss"], rel=1e-5)
    facts = document["configs"]["classification"]
    assert facts["labels"] == ["no", "yes"] and facts["majority_baseline"]["accuracy"] == 0.5
    assert json.loads((run_folder / "evaluate" / "results.json").read_text()) == document


def test_columns_given_by_hand_win(classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.csv").write_text("yes,good film\nno,bad film\n")
    request = EvaluateRequest(
        str(classifier / "run"),
        ("classification",),
        (str(tmp_path / "other.csv"),),
        format="json",
        output=str(tmp_path),
        task_keys=(("text_column", 1), ("label_column", 0)),
    )
    assert run(request) == 0
    assert json.loads(capsys.readouterr().out)["n-samples"]["classification"]["effective"] == 2


def evaluate_on_ranks(rank: int, world_size: int, values: dict[str, Any]) -> int:
    return run(EvaluateRequest(**values))


@pytest.mark.parametrize(("world_size", "tensor"), [(2, 2), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_layout_and_batch_do_not_change_the_numbers(
    lm: Path, classifier: Path, tmp_path: Path, run_ranks: Any, world_size: int, tensor: int
) -> None:
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"text": TEXT[: 20 * i]}) + "\n" for i in range(1, 12)))
    data = (str(tmp_path / "held.jsonl"),)
    for name, model, task in (("lm", lm, "perplexity"), ("cls", classifier / "run", "classification")):
        values: dict[str, Any] = {"model": str(model), "tasks": (task,), "data": data if name == "lm" else ()}
        assert run(EvaluateRequest(**values, output=str(tmp_path / f"{name}1"), batch_size=3)) == 0
        values |= {"output": str(tmp_path / f"{name}2"), "tensor": tensor, "batch_size": 8}
        assert run_ranks(evaluate_on_ranks, world_size, values) == [0] * world_size
        one, two = (json.loads((tmp_path / f"{name}{i}" / "results.json").read_text())["results"][task] for i in (1, 2))
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert two[key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), key
        if name == "lm":
            assert two["loss,none"] == pytest.approx(one["loss,none"], rel=1e-6)


def test_mistakes(lm: Path, classifier: Path, tmp_path: Path) -> None:
    def refused(kind: type[Exception], match: str, *values: Any, **options: Any) -> None:
        with pytest.raises(kind, match=match):
            run(EvaluateRequest(*values, **options))

    refused(UsageError, "unknown task `glue`", str(lm), ("glue",))
    refused(UsageError, "perplexity needs text", str(lm), ("perplexity",))
    refused(CheckpointError, "holds a GPT2LMHeadModel, not a model for classification", str(lm), ("classification",))
    refused(UsageError, "was fine-tuned to a task", str(classifier / "run"), ("perplexity",), ("x.txt",))
    refused(CheckpointError, "no model folder", str(tmp_path / "a" / "b"), ("perplexity",), ("x.txt",))
    refused(DataError, "no file", str(lm), ("perplexity",), (str(tmp_path / "absent.txt"),))
    (tmp_path / "held.txt").write_text(TEXT)
    held = (str(tmp_path / "held.txt"),)
    refused(UsageError, "stride 49", str(lm), ("perplexity",), held, stride=49)
    refused(UsageError, "learned 48 positions", str(lm), ("perplexity",), held, max_length=64)
    (tmp_path / "bad.tsv").write_text("sentence\tverdict\nfine\tperhaps\n")
    bad = (str(tmp_path / "bad.tsv"),)
    refused(DataError, r"bad\.tsv:2: label `perhaps`", str(classifier / "run"), ("classification",), bad)
