"""Fine-tuning end to end on a toy task: it learns, keeps its best, resumes bit for bit, in any layout the same."""

from __future__ import annotations

import hashlib
import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlm_cli.checkpoint.hub import save_model_folder
from mlm_cli.config.schema import ModelSection, Recipe
from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.errors import CheckpointError, DataError, UsageError
from mlm_cli.evaluation import task_scores
from mlm_cli.jobs.finetune import run
from mlm_cli.models.registry import build_gpt
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.tasks.batches import evaluation_batches

GOOD, BAD = ("fine", "lovely", "great"), ("dull", "awful", "poor")


def write_texts(path: Path, num: int, seed: int) -> None:
    """Sentences of filler with one telling word near the end."""
    rng = random.Random(seed)
    with path.open("w") as out:
        for _ in range(num):
            label = rng.randrange(2)
            filler = " ".join(rng.choice(("the", "film", "was", "a", "so")) for _ in range(rng.randrange(1, 6)))
            out.write(f"{filler} {rng.choice((BAD, GOOD)[label])}\t{label}\n")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random language model (``lm``) and a task (``train.tsv``, ``dev.tsv``)."""
    folder = tmp_path_factory.mktemp("toy")
    tokenizer = load_tokenizer("bytes")
    section = ModelSection(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        seq_length=48,
        vocab_size=tokenizer.vocab_size,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        init_std=0.08,
    )
    save_model_folder(build_gpt(section, ParallelContext.single(), seed=5), folder / "lm", tokenizer)
    write_texts(folder / "train.tsv", 320, 1)
    write_texts(folder / "dev.tsv", 80, 2)
    return folder


def make_recipe(toy: Path, output: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "init_from": str(toy / "lm"),
        "task": {"train": str(toy / "train.tsv"), "dev": str(toy / "dev.tsv"), "text_column": 0, "label_column": 1},
        "train": {"steps": 12, "micro_batch_size": 4, "global_batch_size": 16, "precision": "fp32"},
        "optimizer": {"lr": 3e-3},
        "schedule": {"decay": "constant", "warmup_steps": 5},
        "checkpoint": {"every": 0, "keep_last": 1},
        "evaluate": {"every": 6},
        "log": {"every": 1, "tensorboard": False},
        "output": str(output),
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values[section] = {**values.get(section, {}), name: value}
        else:
            values[section] = value
    return Recipe(**values)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state_of(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    wanted = [path for path in files if path.suffix == ".safetensors"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in wanted}


def test_learns_and_keeps_its_best(toy: Path, tmp_path: Path) -> None:
    recipe = make_recipe(toy, tmp_path / "run", train__steps=90, evaluate__every=15)
    assert run(recipe) == 0
    found = [record for record in records(tmp_path / "run") if record.get("dev_accuracy") is not None]
    assert [record["step"] for record in found] == [15, 30, 45, 60, 75, 90]
    best = max(found, key=lambda record: (record["dev_accuracy"], -record["step"]))
    assert best["dev_accuracy"] > 0.95
    # besides the last checkpoint only the best is left, and a pointer names it
    kept = {f"step-{best['step']:08d}", "step-00000090"}
    assert {path.name for path in (tmp_path / "run").glob("step-*")} == kept
    assert (tmp_path / "run" / "best").read_text().strip() == f"step-{best['step']:08d}"
    assert (tmp_path / "run" / "latest").read_text().strip() == "step-00000090"
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "finished" and status["exit_code"] == 0


def test_transformers_reaches_the_reported_accuracy(toy: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    recipe = make_recipe(toy, tmp_path / "run", train__steps=20, evaluate__every=20)
    assert run(recipe) == 0
    folder = tmp_path / "run" / "step-00000020" / "model"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lines = [line.split("\t") for line in (toy / "dev.tsv").read_text().splitlines()]
    right = 0
    with torch.no_grad():
        for text, label in lines:
            logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits
            right += model.config.id2label[int(logits.argmax())] == label
    assert records(tmp_path / "run")[-1]["dev_accuracy"] == pytest.approx(right / len(lines), abs=0.02)


def test_epochs_become_steps(toy: Path, tmp_path: Path) -> None:
    task = {**make_recipe(toy, tmp_path).task.model_dump(exclude_unset=True), "epochs": 2}  # type: ignore[union-attr]
    assert run(make_recipe(toy, tmp_path / "run", task=task, train__micro_batch_size=16, evaluate__every=0)) == 0
    assert [record["step"] for record in records(tmp_path / "run")][-1] == 2 * 320 // 16
    with pytest.raises(UsageError, match="leaves nothing of the 40 steps"):
        run(make_recipe(toy, tmp_path / "other", task=task, schedule__warmup_steps=40))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_six_and_six_steps_are_twelve(toy: Path, tmp_path: Path, precision: str) -> None:
    """By the hash of weights, optimizer state and random generators; with dropout."""
    straight = make_recipe(toy, tmp_path / "straight", train__precision=precision)
    assert run(straight) == 0
    halves = make_recipe(toy, tmp_path / "halves", train__precision=precision, train__steps=6)
    assert run(halves) == 0
    assert run(make_recipe(toy, tmp_path / "halves", train__precision=precision)) == 0
    ends = [state_of(tmp_path / name / "step-00000012") for name in ("straight", "halves")]
    assert ends[0] == ends[1] and len(ends[0]) == 2
    losses = [[record["loss"] for record in records(tmp_path / name)] for name in ("straight", "halves")]
    assert losses[0] == losses[1]


def test_a_resumed_run_remembers_its_best(toy: Path, tmp_path: Path) -> None:
    assert run(make_recipe(toy, tmp_path / "run", train__steps=60, evaluate__every=20)) == 0
    best = (tmp_path / "run" / "best").read_text()
    # with a rate that ruins the model nothing better comes
    ruined = make_recipe(toy, tmp_path / "run", train__steps=70, evaluate__every=5, optimizer__lr=5.0)
    assert run(ruined) == 0
    assert (tmp_path / "run" / "best").read_text() == best
    assert {path.name for path in (tmp_path / "run").glob("step-*")} == {best.strip(), "step-00000070"}


def test_sigterm_during_an_evaluation(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left after the batch, the step saved, and the run goes on to the end of one that was never stopped."""
    assert run(make_recipe(toy, tmp_path / "straight")) == 0
    given: list[int] = []

    def batches(*args: Any, **options: Any) -> Iterator[dict[str, Any]]:
        for batch in evaluation_batches(*args, **options):
            given.append(len(batch["lengths"]))
            if len(given) == 3:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    monkeypatch.setattr(task_scores, "evaluation_batches", batches)
    assert run(make_recipe(toy, tmp_path / "run")) == 75
    assert given == [4, 4, 4] and (tmp_path / "run/latest").read_text().strip() == "step-00000006"
    assert run(make_recipe(toy, tmp_path / "run")) == 0
    ends = [state_of(tmp_path / name / "step-00000012") for name in ("straight", "run")]
    assert ends[0] == ends[1]


def finetune_on_ranks(rank: int, world_size: int, values: dict[str, Any]) -> int:
    return run(Recipe(**values))


@pytest.mark.parametrize(("world_size", "tensor"), [(2, 2), (2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_any_layout_learns_the_same(toy: Path, tmp_path: Path, run_ranks: Any, world_size: int, tensor: int) -> None:
    free = {"model": {"hidden_dropout": 0.0, "attention_dropout": 0.0}}
    assert run(make_recipe(toy, tmp_path / "one", **free)) == 0
    recipe = make_recipe(toy, tmp_path / "many", parallel__tensor=tensor, **free)
    assert run_ranks(finetune_on_ranks, world_size, recipe.model_dump(exclude_unset=True)) == [0] * world_size
    one, many = records(tmp_path / "one"), records(tmp_path / "many")
    assert len(one) == len(many) == 12
    for first, second in zip(one, many):
        for key in ("loss", "grad_norm", "dev_loss"):
            if first.get(key) is not None:
                assert second[key] == pytest.approx(first[key], rel=2e-4), (first["step"], key)
        assert second["tokens"] == first["tokens"]
    assert one[-1]["dev_accuracy"] == pytest.approx(many[-1]["dev_accuracy"], abs=0.02)


def test_mistakes_are_found_before_the_first_step(toy: Path, tmp_path: Path) -> None:
    task = make_recipe(toy, tmp_path).task
    assert task is not None

    def refused(kind: type[Exception], match: str, **changes: Any) -> None:
        with pytest.raises(kind, match=match):
            run(make_recipe(toy, tmp_path / "run", **changes))
        assert not list((tmp_path / "run").glob("step-*"))

    values = task.model_dump(exclude_unset=True)
    (tmp_path / "odd.tsv").write_text("fine\t1\nstrange\tmaybe\n")
    refused(DataError, r"odd\.tsv:2: label `maybe` is not one of", task={**values, "dev": str(tmp_path / "odd.tsv")})
    refused(DataError, "No such file", task={**values, "train": str(tmp_path / "absent.tsv")})
    refused(DataError, r"train\.tsv:1 has no column `sentence`", task={**values, "text_column": "sentence"})
    refused(UsageError, "task.max_length 99 is beyond", task={**values, "max_length": 99})
    refused(CheckpointError, "no model folder", init_from=str(tmp_path / "absent" / "run"))
    with pytest.raises(UsageError, match="needs `task` and `init_from`"):
        run(Recipe(output=str(tmp_path / "run")))


def test_other_data_is_refused_on_resume(toy: Path, tmp_path: Path) -> None:
    assert run(make_recipe(toy, tmp_path / "run", train__steps=2, evaluate__every=0)) == 0
    write_texts(tmp_path / "train.tsv", 320, 9)
    task = make_recipe(toy, tmp_path).task
    assert task is not None
    changed = {**task.model_dump(exclude_unset=True), "train": str(tmp_path / "train.tsv")}
    with pytest.raises(UsageError, match="trained on other data"):
        run(make_recipe(toy, tmp_path / "run", task=changed, train__steps=4))
