"""``mlm evaluate --ensemble`` against averages that `transformers` gives, taken the long way round."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlm_cli.cli.app import run as mlm
from mlm_cli.config.requests import EvaluateRequest
from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.errors import UsageError
from mlm_cli.evaluation.ensemble import mean_token_losses, order_of_labels
from mlm_cli.jobs.evaluate import run
from tests.checkpoint import megatron_oracle_files as megatron
from tests.generation.folders import save_model, save_tokenizer

transformers = pytest.importorskip("transformers")

TEXTS = ["The quick brown fox jumps over the lazy dog. " * 20, "It was a bright cold day in April. " * 20]
HELD = "A bright fox jumps over the cold dog in April, and it was lazy.\n" * 4
LENGTH = 48
ROWS = [("a bright day", "good"), ("a cold dog", "bad"), ("lazy lazy lazy", "bad"), ("the quick fox in April", "good")]
ROWS += [("it was the dog", "fair"), ("over", "good"), ("brown brown fox", "fair")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A GPT-2, a Llama and a checkpoint of Megatron-LM (of a third model) that share a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    found = {name: folder / name for name in ("gpt2", "llama", "megatron")}
    for name, kind, context in (("gpt2", "gpt2", LENGTH), ("llama", "llama", 64), ("third", "gpt2", 96)):
        save_tokenizer(folder / name, TEXTS)
        model = save_model(folder / name, kind, load_tokenizer(folder / name).vocab_size, context)
        with torch.no_grad():  # less sure of themselves than untrained models of this size
            for param in model.parameters():
                param.mul_(0.7)
        model.save_pretrained(folder / name)
    megatron.write(model, folder / "megatron", tensor=2)
    save_tokenizer(folder / "megatron", TEXTS)
    return found | {"third": folder / "third"}


def probabilities(folder: Path, ids: list[int]) -> np.ndarray:
    """Of each token after the first, in windows without overlap, by `transformers`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    with torch.no_grad():
        for begin in range(0, len(ids) - 1, LENGTH):
            window = torch.tensor([ids[begin : begin + LENGTH + 1]])
            probs = model(window[:, :-1]).logits.double().softmax(-1)
            found.append(probs[0].gather(1, window[0, 1:, None])[:, 0])
    return torch.cat(found).numpy()


def test_next_token_probabilities_are_averaged(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "held.txt").write_text(HELD)
    members = [str(models[name]) for name in ("gpt2", "llama", "megatron")]
    command = ["evaluate", "--ensemble", *members, "--task", "perplexity", "--data", str(tmp_path / "held.txt")]
    assert mlm([*command, "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)

    tokenizer = transformers.AutoTokenizer.from_pretrained(models["gpt2"])
    ids = [tokenizer.eos_token_id, *tokenizer(HELD)["input_ids"]]
    alone = [probabilities(models[name], ids) for name in ("gpt2", "llama", "third")]
    wanted = -np.log(np.mean(alone, axis=0))
    pooled = document["results"]["perplexity"]
    assert pooled["loss,none"] == pytest.approx(wanted.mean(), rel=1e-5)
    bits = wanted.sum() / len(HELD.encode()) / math.log(2)
    assert pooled["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    for name, probs in zip(members, alone, strict=True):
        own = document["results"][f"perplexity {name}"]
        assert own["loss,none"] == pytest.approx(-np.log(probs).mean(), rel=1e-5)
    assert pooled["loss,none"] < np.mean([-np.log(probs).mean() for probs in alone])  # by convexity
    assert document["configs"]["perplexity"]["ensemble"] == members
    assert document["configs"]["perplexity"]["max_length"] == LENGTH  # the shortest context of all
    assert document["model_name"] == " + ".join(members)


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two classifiers of `transformers` with other tokenizers, and their labels in another order."""
    folder, found = tmp_path_factory.mktemp("classifiers"), []
    for number, (kind, labels) in enumerate((("GPT2", ["bad", "good", "fair"]), ("Llama", ["fair", "bad", "good"]))):
        place = folder / kind
        save_tokenizer(place, [*TEXTS[number:], "fair brown"], vocab_size=290 + 10 * number)
        sizes: dict[str, Any] = {"vocab_size": load_tokenizer(place).vocab_size, "pad_token_id": 0}
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}
        if kind == "GPT2":
            sizes |= {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
        else:
            sizes |= {"max_position_embeddings": 40, "hidden_size": 32, "intermediate_size": 48}
            sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
        torch.manual_seed(number)
        model = getattr(transformers, f"{kind}ForSequenceClassification")(
            getattr(transformers, f"{kind}Config")(**sizes, **names)
        )
        with torch.no_grad():
            for param in model.parameters():
                if param.dim() > 1:
                    param.normal_(std=0.3)
        model.save_pretrained(place)
        found.append(place)
    return found


def test_class_probabilities_are_averaged(
    classifiers: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dev.tsv").write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in ROWS))
    members = [str(folder) for folder in classifiers]
    command = ["evaluate", "--ensemble", *members, "--task", "classification", "--data", str(tmp_path / "dev.tsv")]
    assert mlm([*command, "--format", "json", "--batch-size", "3"]) == 0
    document = json.loads(capsys.readouterr().out)

    labels, alone = ["bad", "good", "fair"], []
    for folder in classifiers:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        order = [model.config.label2id[label] for label in labels]
        with torch.no_grad():
            rows = [model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0] for text, _ in ROWS]
        alone.append(torch.stack(rows).double().softmax(-1).numpy()[:, order])
    truth = np.array([labels.index(label) for _, label in ROWS])
    names = ["classification", *(f"classification {name}" for name in members)]
    accuracies = []
    for name, probs in zip(names, [np.mean(alone, axis=0), *alone], strict=True):
        entry = document["results"][name]
        assert entry["accuracy,none"] == pytest.approx((probs.argmax(1) == truth).mean())
        assert entry["loss,none"] == pytest.approx(-np.log(probs[np.arange(len(ROWS)), truth]).mean(), rel=1e-4)
        accuracies.append(entry["accuracy,none"])
    assert len(set(accuracies)) > 1 and document["configs"]["classification"]["labels"] == labels

    assert mlm(command) == 0  # as a table: the ensemble first, then each alone
    table = capsys.readouterr().out
    places = [table.index(f"| classification{name}") for name in (" ", *(f" {name}" for name in members))]
    assert places == sorted(places)


def on_ranks(rank: int, world_size: int, requests: list[dict[str, Any]]) -> list[int]:
    from mlm_cli import distributed

    leave, distributed.shutdown = distributed.shutdown, lambda: None  # one group for all of them
    try:
        return [run(EvaluateRequest(**values)) for values in requests]
    finally:
        distributed.shutdown = leave


@pytest.mark.slow
def test_data_ranks_share_the_work(
    models: dict[str, Path], classifiers: list[Path], tmp_path: Path, run_ranks: Any
) -> None:
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"text": HELD[: 9 * i]}) + "\n" for i in range(1, 9)))
    (tmp_path / "dev.tsv").write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in ROWS))
    cases = {
        "perplexity": ((str(models["gpt2"]), str(models["llama"])), "held.jsonl"),
        "classification": (tuple(map(str, classifiers)), "dev.tsv"),
    }
    values = {
        task: {
            "model": members[0],
            "ensemble": members[1:],
            "tasks": (task,),
            "data": (str(tmp_path / data),),
            "batch_size": 2,
            "output": str(tmp_path / task),
        }
        for task, (members, data) in cases.items()
    }
    alone = {}
    for task, request in values.items():
        assert run(EvaluateRequest(**request)) == 0
        alone[task] = json.loads((tmp_path / task / "results.json").read_text())["results"]
    assert run_ranks(on_ranks, 2, list(values.values())) == [[0, 0], [0, 0]]
    for task, one in alone.items():
        two = json.loads((tmp_path / task / "results.json").read_text())["results"]
        assert one.keys() == two.keys()
        for name, entry in one.items():
            for key, value in entry.items():
                assert two[name][key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), key


def test_mean_losses() -> None:
    probs = torch.tensor([[0.5, 1e-30], [0.25, 1e-40]], dtype=torch.float64)
    torch.testing.assert_close(mean_token_losses(-probs.log()), -probs.mean(0).log())
    assert mean_token_losses(-probs[:1].log()).equal(-probs[0].log())


def test_order_of_labels() -> None:
    assert order_of_labels(["a", "b", "c"], ["c", "a", "b"], ("x", "y")) == [2, 0, 1]
    with pytest.raises(UsageError, match="x tells a, b apart, y a, c"):
        order_of_labels(["a", "b"], ["a", "c"], ("x", "y"))


def test_mistakes(
    models: dict[str, Path], classifiers: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "held.txt").write_text(HELD)
    save_tokenizer(tmp_path / "other", ["something else entirely, zzz zzz"])
    save_model(tmp_path / "other", "gpt2", load_tokenizer(tmp_path / "other").vocab_size)
    gpt2, held = str(models["gpt2"]), str(tmp_path / "held.txt")
    for code, words, said in (
        (2, (gpt2,), "two or more models"),
        (2, (gpt2, gpt2), "named twice"),
        (2, (gpt2, str(tmp_path / "other")), "another tokenizer"),
        (2, (gpt2, str(classifiers[0])), "was fine-tuned to a task"),
        (4, (gpt2, str(tmp_path / "no" / "where")), "no model folder"),
    ):
        assert mlm(["evaluate", "--ensemble", *words, "--task", "perplexity", "--data", held]) == code
        assert said in capsys.readouterr().err
    (tmp_path / "dev.tsv").write_text("text\tlabel\nfine\tgood\n")
    data = ["--task", "classification", "--data", str(tmp_path / "dev.tsv")]
    assert mlm(["evaluate", "--ensemble", str(classifiers[0]), gpt2, *data]) == 4
    assert "not a model for classification" in capsys.readouterr().err
    assert mlm(["evaluate", gpt2, "parallel.pipeline=2", "--task", "perplexity", "--data", held, "--nproc", "2"]) == 2
    assert "no pipeline stages" in capsys.readouterr().err
