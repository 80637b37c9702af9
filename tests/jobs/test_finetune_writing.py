"""Fine-tuning to texts that are written, end to end: it learns, resumes bit for bit, in any layout the same."""

from __future__ import annotations

import json
import random
import signal
import string
from pathlib import Path
from typing import Any

import pytest

from mlm_cli.checkpoint.hub import read_model_config, save_model_folder
from mlm_cli.cli.app import run as mlm
from mlm_cli.config.checks import check
from mlm_cli.config.requests import EvaluateRequest, GenerateRequest
from mlm_cli.config.schema import ModelSection, Recipe
from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.errors import CheckpointError, UsageError
from mlm_cli.evaluation import written_texts
from mlm_cli.jobs import evaluate, generate
from mlm_cli.jobs.finetune import run
from mlm_cli.jobs.tokenizer import TrainRequest, train
from mlm_cli.models.registry import build_model
from mlm_cli.parallel.context import ParallelContext
from tests.jobs.test_finetune import records, state_of
from tests.jobs.test_finetune_bert import commands, read
from tests.tasks.test_writing import SECTIONS

GERMAN = {"red": "rot", "old": "alt", "cat": "katze", "dog": "hund", "sun": "sonne"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random models (``t5``, ``gpt2``) and pairs of words in two languages (``train``, ``dev``)."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "words.txt").write_text("\n".join([*GERMAN, *GERMAN.values(), *string.printable]) * 20)
    request = TrainRequest((str(folder / "words.txt"),), str(folder / "tok"), "bpe", 400, special_tokens="t5")
    train(request)
    for layout in ("t5", "gpt2"):
        tokenizer = load_tokenizer(folder / "tok" if layout == "t5" else "bytes")
        section = ModelSection(**SECTIONS[layout], vocab_size=tokenizer.vocab_size, init_std=0.08)
        save_model_folder(build_model(section, ParallelContext.single(), seed=5), folder / layout, tokenizer)
    for name, count, seed in (("train", 160, 1), ("dev", 24, 2)):
        rng = random.Random(seed)
        words = [[rng.choice(list(GERMAN)) for _ in range(rng.randrange(1, 3))] for _ in range(count)]
        (folder / f"{name}.en").write_text("".join(" ".join(line) + "\n" for line in words))
        (folder / f"{name}.de").write_text("".join(" ".join(GERMAN[word] for word in line) + "\n" for line in words))
    return folder


def make_recipe(toy: Path, output: Path, layout: str = "gpt2", **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "init_from": str(toy / layout),
        "task": {
            "name": "text_generation", "train": str(toy / "train"), "dev": str(toy / "dev"), "text_column": "en",
            "label_column": "de", "prefix": "> ", "max_target_length": 16,
        },
        "train": {"steps": 8, "micro_batch_size": 4, "global_batch_size": 8, "precision": "fp32"},
        "optimizer": {"lr": 5e-3},
        "schedule": {"decay": "constant", "warmup_steps": 5},
        "checkpoint": {"every": 0, "keep_last": 1},
        "evaluate": {"every": 4, "micro_batch_size": 5},
        "log": {"every": 1, "tensorboard": False},
        "output": str(output),
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section] = {**values.get(section, {}), name: value}
    return Recipe(**values)


def test_a_causal_model_learns_what_is_written(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Most words right, from none; ``mlm generate`` puts prompts between prefix and suffix as in training."""
    assert run(make_recipe(toy, tmp_path / "run", train__steps=150, evaluate__every=50)) == 0
    found = [record for record in records(tmp_path / "run") if "dev_f1" in record]
    assert found[-1]["dev_f1"] > 0.8
    capsys.readouterr()

    def answer(prompt: str, **settings: Any) -> tuple[str, int]:
        request = GenerateRequest(str(tmp_path / "run"), (prompt,), temperature=0.0, format="json", **settings)
        assert generate.run(request) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["prompt"] == prompt
        return record["text"], record["num_prompt_tokens"]

    assert answer("cat") == answer("> cat\n", as_trained=False) == ("katze", len("> cat\n"))
    assert answer("cat", as_trained=False)[1] == len("cat")


def test_sigterm_while_texts_are_written(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluation is left, the step saved, and the run goes on to the end of one that was never stopped."""
    assert run(make_recipe(toy, tmp_path / "straight")) == 0
    made, asked = written_texts.decoder_of, []

    def stopped(model: Any, *given: Any, **settings: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        asked.append(model.training)
        return made(model, *given, **settings)

    monkeypatch.setattr(written_texts, "decoder_of", stopped)
    assert run(make_recipe(toy, tmp_path / "run")) == 75 and asked == [False]
    assert records(tmp_path / "run")[-1]["step"] == 4 and "dev_f1" not in records(tmp_path / "run")[-1]
    assert (tmp_path / "run/latest").read_text().strip() == "step-00000004"
    monkeypatch.setattr(written_texts, "decoder_of", made)
    assert run(make_recipe(toy, tmp_path / "run")) == 0
    ends = [state_of(tmp_path / name / "step-00000008") for name in ("straight", "run")]
    assert ends[0] == ends[1]


def tune_on_ranks(rank: int, world_size: int, values: dict[str, Any]) -> int:
    return run(Recipe(**values))


@pytest.mark.parametrize(
    ("layout", "key", "value"),
    [
        ("t5", "tensor", 2),
        ("gpt2", "zero", 2),
        pytest.param("t5", "zero", 1, marks=pytest.mark.slow),
        pytest.param("gpt2", "tensor", 2, marks=pytest.mark.slow),
    ],
)
def test_any_layout_learns_the_same(
    layout: str, key: str, value: int, toy: Path, tmp_path: Path, run_ranks: Any
) -> None:
    assert run(make_recipe(toy, tmp_path / "one", layout)) == 0
    recipe = make_recipe(toy, tmp_path / "many", layout, **{f"parallel__{key}": value})
    assert run_ranks(tune_on_ranks, 2, recipe.model_dump(exclude_unset=True)) == [0, 0]
    one, many = records(tmp_path / "one"), records(tmp_path / "many")
    assert len(one) == len(many) == 8
    for first, second in zip(one, many):
        assert second["tokens"] == first["tokens"]
        keys = {"loss", "grad_norm", "dev_loss", "dev_f1"} & first.keys()
        assert {key: second[key] for key in keys} == pytest.approx({key: first[key] for key in keys}, rel=3e-4)


@pytest.mark.parametrize(("layout", "precision"), [("t5", "bf16"), ("gpt2", "fp32")])
def test_four_and_four_steps_are_eight(layout: str, precision: str, toy: Path, tmp_path: Path) -> None:
    """By the hash of weights, optimizer state and random generators; with dropout; evaluation draws no numbers."""
    shared = {"train__precision": precision, "model__hidden_dropout": 0.1, "model__attention_dropout": 0.1}
    assert run(make_recipe(toy, tmp_path / "straight", layout, evaluate__every=0, **shared)) == 0
    assert run(make_recipe(toy, tmp_path / "halves", layout, train__steps=4, **shared)) == 0
    assert run(make_recipe(toy, tmp_path / "halves", layout, **shared)) == 0
    ends = [state_of(tmp_path / name / "step-00000008") for name in ("straight", "halves")]
    assert ends[0] == ends[1] and len(ends[0]) == 2


def test_zero_3_trains_and_is_scored_afterwards(toy: Path, tmp_path: Path, run_ranks: Any) -> None:
    recipe = make_recipe(toy, tmp_path / "run", parallel__zero=3, evaluate__every=4)
    told = [str(mistake) for mistake in check(recipe, verb="finetune", world_size=2)]
    assert [what for what in told if "writes texts at its own pace" in what]
    values = make_recipe(toy, tmp_path / "run", "t5", parallel__zero=3, evaluate__every=0).model_dump(
        exclude_unset=True
    )
    assert run_ranks(tune_on_ranks, 2, values) == [0, 0]
    assert run(make_recipe(toy, tmp_path / "one", "t5", evaluate__every=0)) == 0
    one, many = ([record["loss"] for record in records(tmp_path / name)] for name in ("one", "run"))
    assert many == pytest.approx(one, rel=3e-4)
    request = EvaluateRequest(str(tmp_path / "run"), ("text_generation",), limit=6)
    assert evaluate.run(request) == 0
    results = json.loads((tmp_path / "run/evaluate/results.json").read_text())
    assert results["n-samples"]["text_generation"] == {"original": 24, "effective": 6}


def test_beams_write_the_dev_file_as_they_answer_prompts(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(toy, tmp_path / "run", train__steps=20, evaluate__every=0, task__beams=3)
    assert run(recipe) == 0
    assert evaluate.run(EvaluateRequest(str(tmp_path / "run"), ("text_generation",))) == 0
    written = (tmp_path / "run/evaluate/predictions.txt").read_text().splitlines()
    capsys.readouterr()
    prompts = tuple((toy / "dev.en").read_text().splitlines())
    texts = []
    for beams in (3, 1):
        request = GenerateRequest(
            str(tmp_path / "run"), prompts, temperature=0.0, beams=beams, max_new_tokens=16, format="json"
        )
        assert generate.run(request) == 0
        lines = capsys.readouterr().out.splitlines()
        texts.append([" ".join(json.loads(line)["text"].split()) for line in lines])
    assert texts[0] == written != texts[1]


def captions(test_data: Path, folder: Path) -> None:
    for language in ("en", "de"):
        lines = read(test_data / f"finetune/multi30k/val.{language}.gz").splitlines(keepends=True)
        for name, part in (("train", lines[:200]), ("dev", lines[200:216])):
            (folder / f"{name}.{language}").write_text("".join(part), encoding="utf-8")


def papers(test_data: Path, folder: Path) -> None:
    lines = read(test_data / "finetune/scitldr/dev.jsonl").splitlines(keepends=True)
    for name, part in (("train", lines[:200]), ("dev", lines[200:216])):
        (folder / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")


@pytest.mark.parametrize(
    ("source", "name", "write", "metric", "data", "keys"),
    [
        ("t5", "t5-translation", captions, "chrf", ["dev"], ["task.text_column=en", "task.label_column=de"]),
        (
            "gpt",
            "gpt-summarization",
            papers,
            "rouge1",
            ["dev.jsonl"],
            ["task.text_column=source", "task.label_column=target"],
        ),
    ],
)
def test_the_commands_of_the_debug_recipes(
    source: str,
    name: str,
    write: Any,
    metric: str,
    data: list[str],
    keys: list[str],
    test_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On real files: it trains, keeps the best by the right metric, and ``mlm evaluate`` gives that score again."""
    novel = sorted((test_data / "corpora/english_novels").glob("*.gz"))[0]
    (tmp_path / "book.txt").write_text(read(novel)[:60_000], encoding="utf-8")
    write(test_data, tmp_path)
    monkeypatch.chdir(tmp_path)
    for command in commands(f"debug/{source}"):
        few = ["train.steps=10", "checkpoint.every=10", "evaluate.every=0"] if command[0] == "pretrain" else []
        assert mlm([*command, *few]) == 0, command
    tune, write_one, score = commands(f"debug/{name}")
    assert mlm([*tune, "train.steps=20", "log.every=1", "log.tensorboard=false"]) == 0
    run_folder = tmp_path / "runs" / f"debug-{name}"
    best = max(record[f"dev_{metric}"] for record in records(run_folder) if f"dev_{metric}" in record)
    losses = [record["loss"] for record in records(run_folder)]
    assert sum(losses[-10:]) < sum(losses[:10])
    capsys.readouterr()
    assert mlm(write_one) == 0
    capsys.readouterr()
    assert mlm([*score, "--format", "json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    (found,) = results.values()
    assert found[f"{metric},none"] == pytest.approx(best, abs=1e-9)
    lines = [json.loads(line) for line in (run_folder / "evaluate/predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 16 and lines[0]["where"].endswith(":1")
    # A copy in another layout writes as it does, and where it is no T5 its text has a perplexity.
    answers = []
    for folder in (str(run_folder), "copy"):
        assert folder != "copy" or mlm(["convert", str(run_folder), folder, "--to", "hf"]) == 0
        capsys.readouterr()
        assert mlm([*score[:1], folder, *score[2:], "--data", *data, "--limit", "4", "--format", "json", *keys]) == 0
        answers.append(json.loads(capsys.readouterr().out)["results"])
    assert answers[0] == answers[1]
    assert mlm(["evaluate", "copy", "--task", "perplexity", "--data", "book.txt", "--limit", "1"]) == (
        2 if source == "t5" else 0
    )
    _, config = read_model_config(run_folder / "step-00000020/model")
    assert config.values["architectures"] == ["T5ForConditionalGeneration" if source == "t5" else "GPT2LMHeadModel"]


def test_mistakes_are_found_before_the_first_step(toy: Path, tmp_path: Path) -> None:
    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(UsageError, match=match):
            run(make_recipe(toy, tmp_path / "run", **changes))
        assert not list((tmp_path / "run").glob("step-*"))

    refused("leave no room for a text beside task.max_target_length 48", task__max_target_length=48)
    refused("tasks have no heads for the t5 family", layout="t5", task__name="classification")
    (tmp_path / "odd").mkdir()
    for path in (toy / "t5").iterdir():
        (tmp_path / "odd" / path.name).write_bytes(path.read_bytes())
    settings = json.loads((toy / "t5/generation_config.json").read_text())  # which count before those of config.json
    (tmp_path / "odd/generation_config.json").write_text(json.dumps({**settings, "decoder_start_token_id": 7}))
    with pytest.raises(CheckpointError, match="`decoder_start_token_id` is 7, the tokenizer's padding"):
        run(make_recipe(tmp_path, tmp_path / "run", "odd", task__train=str(toy / "train"), task__dev=str(toy / "dev")))
    with pytest.raises(UsageError, match="texts that several models write have no mean"):
        evaluate.run(
            EvaluateRequest(
                str(toy / "t5"), ("text_generation",), data=(str(toy / "dev"),), ensemble=(str(toy / "gpt2"),),
                task_keys=(("text_column", "en"), ("label_column", "de")),
            )
        )  # fmt: skip


def test_an_untrained_model_is_scored_with_the_settings_given(toy: Path, tmp_path: Path) -> None:
    def scored(**keys: Any) -> dict[str, Any]:
        given = {"text_column": "en", "label_column": "de", "max_target_length": 8, **keys}
        request = EvaluateRequest(
            str(toy / "gpt2"), ("text_generation",), data=(str(toy / "dev"),), limit=4, output=str(tmp_path),
            task_keys=tuple(given.items()),
        )  # fmt: skip
        assert evaluate.run(request) == 0
        return json.loads((tmp_path / "results.json").read_text())["configs"]["text_generation"]

    assert scored()["max_length"] == 48 and scored(max_length=24)["max_length"] == 24
    assert scored(prefix="> ")["prefix"] == "> "
    with pytest.raises(UsageError, match=r"task\.max_length 99 is beyond the model's context of 48 tokens"):
        scored(max_length=99)
