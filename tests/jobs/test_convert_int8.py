"""``mlm convert --dtype int8``: from every form to every form, and wherever a MODEL is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlm_cli import ops
from mlm_cli.checkpoint.hub import load_model_folder
from mlm_cli.checkpoint.manifest import find_damage, read_manifest
from mlm_cli.cli.app import run as mlm
from mlm_cli.jobs import generate
from mlm_cli.parallel.context import ParallelContext
from tests.generation.folders import save_folder

transformers = pytest.importorskip("transformers")

ONE = ParallelContext.single()
TEXTS = ["The quick brown fox jumps over the lazy dog. " * 20, "naïve café — 東京 🙂 " * 40]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    save_folder(folder, request.param, TEXTS)
    return request.param, folder


def convert(*words: object) -> int:
    return mlm(["convert", *map(str, words), "--quiet"])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_all_forms(source: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind, folder = source
    small = tmp_path / "small"
    command = ["convert", str(folder), str(small), "--to", "mlm", "--dtype", "int8", "--format", "json"]
    assert mlm([*command, "--dry-run"]) == 0
    dry = json.loads(capsys.readouterr().out)
    assert mlm(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert dry.items() <= report.items() and report["dtype"] == "int8"
    assert report["architecture"] == ("MlmForCausalLM" if kind == "gpt2" else "LlamaForCausalLM")
    assert not find_damage(small, read_manifest(small))

    # The weights that int8 stands for, exactly: as plain files of transformers, and as int8 again.
    stood_for = {name: param.detach() for name, param in load_model_folder(small / "model", ONE)[0].named_parameters()}
    assert convert(small, tmp_path / "plain", "--to", "hf", "--dtype", "fp32") == 0
    plain, _ = load_model_folder(tmp_path / "plain", ONE)
    assert all(param.equal(stood_for[name]) for name, param in plain.named_parameters())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    ids = torch.tensor([[5, 9, 200, 31, 17]])
    with torch.no_grad():
        mine = plain.eval().gather_logits(plain(ids))
        torch.testing.assert_close(mine, theirs(ids).logits, rtol=1e-4, atol=1e-3)
    for dtype in ("auto", "int8"):
        assert convert(small, tmp_path / dtype, "--to", "mlm", "--dtype", dtype) == 0
        again = tmp_path / dtype / "model"
        for file in ("model.safetensors", "config.json", "README.md"):
            assert (again / file).read_bytes() == (small / "model" / file).read_bytes()
    held = {tensor.dtype for tensor in weights(tmp_path / "plain").values()}
    assert held == {torch.float32} and (tmp_path / "plain" / "tokenizer.json").is_file()


def test_cards_say_what_is_there(source: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = source
    for name, model, dtype in (("a", folder, "auto"), ("b", tmp_path / "a", "int8"), ("c", tmp_path / "b", "bf16")):
        assert convert(model, tmp_path / name, "--to", "mlm", "--dtype", dtype) == 0
    a, b, c = ((tmp_path / name / "model" / "README.md").read_text() for name in "abc")
    assert c == a.replace("| weights | float32 |", "| weights | bfloat16 |") != a
    assert "int8 in the layers (compressed-tensors), float32 elsewhere" in b
    assert ("in `transformers`" in b) == (kind == "llama") and "in `transformers`" in a


def test_what_has_no_place(source: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind, folder = source
    assert convert(folder, tmp_path / "small", "--to", "mlm", "--dtype", "int8") == 0
    capsys.readouterr()
    for model, dtype in ((folder, "int8"), (tmp_path / "small", "auto")):
        assert convert(model, tmp_path / "x", "--to", "megatron", "--dtype", dtype) == 2
        assert "no place for int8" in capsys.readouterr().err
        assert convert(model, tmp_path / f"hf {dtype}", "--to", "hf", "--dtype", dtype) == (2 if kind == "gpt2" else 0)
        if kind == "gpt2":
            error = capsys.readouterr().err
            assert "linear layers only" in error and "`--to mlm`" in error
    assert convert(tmp_path / "small", tmp_path / "megatron", "--to", "megatron", "--dtype", "fp32") == 0
    state = weights(folder)
    name = next(name for name in state if name.endswith(("c_fc.weight", "up_proj.weight")))
    state[name][1, 2] = float("nan")
    save_file(state, tmp_path / "plain.safetensors")
    broken = tmp_path / "broken"
    assert convert(folder, broken, "--to", "hf") == 0
    (tmp_path / "plain.safetensors").replace(broken / "model.safetensors")
    assert convert(broken, tmp_path / "y", "--to", "mlm", "--dtype", "int8") == 4
    assert "layers.0.mlp.up.weight cannot be made int8" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir() if path.name in ("x", "y")) == []


def test_wherever_a_model_is_named(source: tuple[str, Path], tmp_path: Path) -> None:
    """Scored, int8 gives what the weights that it stands for give; and training goes on from it as from them."""
    _, folder = source
    assert convert(folder, tmp_path / "small", "--to", "mlm", "--dtype", "int8") == 0
    assert convert(tmp_path / "small", tmp_path / "plain", "--to", "mlm", "--dtype", "fp32") == 0
    text = tmp_path / "text.txt"
    text.write_text(TEXTS[0])
    found: dict[str, Any] = {}
    for name in ("small", "plain"):
        out = tmp_path / f"{name}.scores"
        command = ["evaluate", str(tmp_path / name), "--task", "perplexity", "--data", str(text), "--output", str(out)]
        assert mlm([*command, "--quiet"]) == 0
        found[name] = json.loads((out / "results.json").read_text())["results"]
    assert found["small"] == found["plain"]
    for name in ("small", "plain"):
        assert mlm(["preprocess", str(text), "--tokenizer", str(folder), "--output", str(tmp_path / name), "-q"]) == 0
        section = load_model_folder(tmp_path / name / "model", ONE)[1].model_dump(mode="json", exclude_none=True)
        recipe = {
            "model": section, "tokenizer": str(folder), "data": {"path": f"{tmp_path / name}_text_document"},
            "train": {"steps": 2, "micro_batch_size": 2, "global_batch_size": 2, "precision": "fp32"},
            "init_from": str(tmp_path / name), "log": {"every": 1}, "output": str(tmp_path / f"{name}.run"),
        }  # fmt: skip
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        assert mlm(["pretrain", str(tmp_path / "recipe.yaml"), "--quiet"]) == 0
        lines = (tmp_path / f"{name}.run" / "metrics.jsonl").read_text().splitlines()
        found[name] = [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
    assert found["small"] == found["plain"] and len(found["small"]) == 2


def test_generation_keeps_int8(
    source: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices stay int8 where the fused step reads them, and answers are those of what they stand for, any way."""
    _, folder = source
    assert convert(folder, tmp_path / "small", "--to", "mlm", "--dtype", "int8") == 0
    assert convert(tmp_path / "small", tmp_path / "plain", "--to", "mlm", "--dtype", "fp32") == 0
    held: list[torch.dtype] = []
    real = generate.decoder_of

    def watched(model: Any, *args: Any, **options: Any) -> Any:
        decoder = real(model, *args, **options)
        held.append(model.layers[1].mlp.up.weight.dtype)
        return decoder

    monkeypatch.setattr(generate, "decoder_of", watched)
    ways: list[list[str]] = [[], ["generate.beams=3"], ["generate.contrastive_alpha=0.6", "--top-k", "4"]]
    for way in ways:
        answers = []
        for name in ("small", "plain"):
            capsys.readouterr()
            command = ["generate", str(tmp_path / name), "--prompt", "The quick", "--max-new-tokens", "12", "--quiet"]
            assert mlm([*command, *way, *([] if way else ["--temperature", "0"])]) == 0
            answers.append(capsys.readouterr().out)
        assert answers[0] == answers[1] and answers[0].strip()
    fused = torch.int8 if ops.serves_decode_step(torch.float32, torch.device("cpu")) else torch.float32
    assert held[::2] == [fused, fused, torch.float32] and held[1::2] == [torch.float32] * 3


def test_a_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its head stays as it is; of a GPT-2 it is refused."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 400}
    config = transformers.BertConfig(**sizes, num_attention_heads=4, id2label={0: "bad", 1: "good"})
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "theirs")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{n}" for n in range(395))]
    (tmp_path / "theirs" / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    assert convert(tmp_path / "theirs", tmp_path / "small", "--to", "hf", "--dtype", "int8") == 0
    stored = weights(tmp_path / "small")
    assert stored["classifier.weight"].equal(model.classifier.weight)
    assert stored["bert.encoder.layer.1.output.dense.weight"].dtype == torch.int8
    assert convert(tmp_path / "small", tmp_path / "again", "--to", "hf", "--dtype", "int8") == 0
    again = weights(tmp_path / "again")
    assert again.keys() == stored.keys() and all(again[name].equal(stored[name]) for name in stored)
    assert convert(tmp_path / "small", tmp_path / "plain", "--to", "hf", "--dtype", "fp32") == 0
    plain = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    with torch.no_grad():
        ids = torch.tensor([[2, 8, 9, 3]])
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=0, atol=0.02)

    save_folder(tmp_path / "words", "gpt2", TEXTS)
    gpt2 = transformers.GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=2, num_labels=2, pad_token_id=0)
    transformers.GPT2ForSequenceClassification(gpt2).save_pretrained(tmp_path / "words")
    capsys.readouterr()
    assert convert(tmp_path / "words", tmp_path / "z", "--to", "mlm", "--dtype", "int8") == 2
    assert "language models only" in capsys.readouterr().err
