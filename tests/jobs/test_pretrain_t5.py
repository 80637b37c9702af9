"""T5 from text to answers by its debug recipe; a stop and a resume change no bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlm_cli.config.requests import EvaluateRequest, GenerateRequest
from mlm_cli.config.resolve import resolve_recipe
from mlm_cli.config.schema import Recipe
from mlm_cli.errors import UsageError
from mlm_cli.jobs import evaluate, generate, pretrain
from mlm_cli.jobs.tokenizer import TrainRequest, train
from tests.jobs.preprocess_runs import preprocess
from tests.jobs.pretrain_runs import fingerprints, metrics


@pytest.fixture(scope="module")
def data(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, `tok`, and text encoded by it, `book`."""
    folder = tmp_path_factory.mktemp("t5")
    train(TrainRequest((str(tiny_text),), str(folder / "tok"), "unigram", 400, max_train_mb=0.1, special_tokens="t5"))
    preprocess(tiny_text, output=folder / "book", tokenizer=str(folder / "tok"))
    return folder


def recipe(data: Path, output: Path, *overrides: str) -> Recipe:
    values = [
        f"tokenizer={data / 'tok'}",
        f"data.path={data / 'book_text_document'}",
        f"output={output}",
        "train.steps=20",
        "log.tensorboard=false",
        "evaluate.every=10",
        "checkpoint.every=10",
        "model.hidden_dropout=0.1",
        "model.attention_dropout=0.1",
        *overrides,
    ]
    return resolve_recipe("debug/t5", values, verb="pretrain", world_size=1)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "t5"
    assert pretrain.run(recipe(data, output)) == 0
    return output


def test_it_learns_and_validates(run: Path) -> None:
    records = metrics(run)
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    last = [record for record in records if "valid_loss" in record][-1]
    assert 0 < last["valid_accuracy"] < 1
    written = resolve_recipe(str(run / "recipe.yaml"))
    assert written.model.decoder_seq_length == 14  # 70 tokens of text: 10 masked, 3 spans, and the end
    config = json.loads((run / "step-00000020" / "model" / "config.json").read_text())
    assert config["architectures"] == ["T5ForConditionalGeneration"] and config["decoder_start_token_id"] == 0


def test_a_resumed_run_ends_with_the_same_bits(run: Path, data: Path, tmp_path: Path) -> None:
    assert pretrain.run(recipe(data, tmp_path / "t5", "train.steps=10", "schedule.decay_steps=20")) == 0
    assert pretrain.run(recipe(data, tmp_path / "t5", "schedule.decay_steps=20", "train.recompute=full")) == 0
    mine, straight = (
        {name: digest for name, digest in fingerprints(folder / "step-00000020").items() if "README" not in name}
        for folder in (tmp_path / "t5", run)
    )
    assert mine == straight


def test_answers_are_those_of_transformers(run: Path, capsys: Any) -> None:
    transformers = pytest.importorskip("transformers")
    text = "def parse(<extra_id_0> message):"
    assert generate.run(GenerateRequest(str(run), (text,), temperature=0.0, max_new_tokens=15)) == 0
    ours = capsys.readouterr().out.rstrip("\n")
    folder = run / "step-00000020" / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
    ids = tokenizer(text + tokenizer.eos_token, add_special_tokens=False, return_tensors="pt").input_ids
    found = model.generate(ids, do_sample=False, max_new_tokens=15)[0, 1:]
    assert ours == tokenizer.decode(found, skip_special_tokens=True).rstrip("\n")


def test_it_gives_no_perplexity(run: Path, tiny_text: Path) -> None:
    with pytest.raises(UsageError, match="is an encoder-decoder"):
        evaluate.run(EvaluateRequest(str(run), ("perplexity",), data=(str(tiny_text),)))
