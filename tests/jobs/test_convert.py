"""``mlm convert``: every layout to every other, whole or not at all, and what cannot be converted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mlm_cli.checkpoint.hub import load_model_folder, resolve_model
from mlm_cli.checkpoint.manifest import find_damage, read_manifest
from mlm_cli.cli.app import run as mlm
from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.generation.answer import Settings
from mlm_cli.generation.decoder import Decoder
from mlm_cli.generation.generator import Generator
from mlm_cli.generation.sampling import Sampling
from mlm_cli.parallel.context import ParallelContext
from tests.checkpoint import megatron_oracle_files as megatron
from tests.checkpoint.in_slices import read_write_and_continue
from tests.checkpoint.test_hub import ONE, THEIRS, theirs, tokens
from tests.checkpoint.test_megatron import LAYOUTS, TOKENS, expected, with_vocabulary
from tests.checkpoint.test_megatron import theirs as random_model
from tests.generation.folders import save_folder
from tests.generation.test_generator import Numbers, encoded

transformers = pytest.importorskip("transformers")

TEXTS = ["The quick brown fox jumps over the lazy dog. " * 20, "naïve café — 東京 🙂 " * 40]
PROMPTS = [[5, 9, 200, 31], [17], list(range(40, 70)), [300, 2, 2, 300, 2]]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder of `transformers` with its tokenizer, and the model in it."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, save_folder(folder, request.param, TEXTS)


def convert(*words: object) -> int:
    return mlm(["convert", *map(str, words), "--quiet"])


def greedy(folder: Path, context: ParallelContext = ONE) -> list[list[int]]:
    model, _ = load_model_folder(folder, context)
    settings = Settings(Sampling(temperature=0), 20, (), frozenset({0}))
    generator = Generator(Decoder(model.eval(), 2), settings, Numbers)
    return [answer.tokens for answer in generator.answers(encoded(PROMPTS))]


def their_greedy(model: Any) -> list[list[int]]:
    return [
        [token for token in model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=20, pad_token_id=0
        )[0, len(prompt) :].tolist() if token]
        for prompt in PROMPTS
    ]  # fmt: skip


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_there_and_back_through_megatron(source: tuple[Path, Any], layout: tuple[int, int], tmp_path: Path) -> None:
    folder, model = source
    tensor, pipeline = layout
    there, back, run = tmp_path / "megatron", tmp_path / "deep" / "back", tmp_path / "run"
    assert convert(folder, there, "--to", "megatron", "--tensor", tensor, "--pipeline", pipeline) == 0
    assert len(list(there.glob("release/mp_rank_*/model_optim_rng.pt"))) == tensor * pipeline
    ids = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        wanted = model(ids).logits
    torch.testing.assert_close(megatron.logits(there / "release", ids)[..., :400], wanted, rtol=1e-4, atol=1e-3)
    assert greedy(there) == their_greedy(model)  # a folder of Megatron-LM is a MODEL

    assert convert(there, back, "--to", "hf") == 0
    assert (back / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    again, info = transformers.AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert their_greedy(again) == their_greedy(model)
    text = "The quick naïve 東京"
    assert transformers.AutoTokenizer.from_pretrained(back)(text)["input_ids"] == load_tokenizer(folder).encode(text)

    assert convert(there, run, "--to", "mlm") == 0
    assert resolve_model(run) == run / "model" and not find_damage(run, read_manifest(run))
    assert (run / "model" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_fine_tuning_starts_from_megatron(source: tuple[Path, Any], tmp_path: Path) -> None:
    from mlm_cli.models.heads import HeadSpec
    from mlm_cli.tasks.task_folder import start_task_model

    folder, _ = source
    assert convert(folder, tmp_path / "there", "--to", "megatron") == 0
    batch = {"tokens": torch.tensor([PROMPTS[0]]), "lengths": torch.tensor([4])}
    with torch.no_grad():
        first, second = (
            start_task_model(place, ONE, HeadSpec("sequence", 3), seed=1).eval()(batch)
            for place in (folder, tmp_path / "there")
        )
    assert first.equal(second)


def test_numbers_for_machines(source: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = source
    command = [str(folder), str(tmp_path / "out"), "--to", "hf", "--dtype", "bf16", "--format", "json"]
    assert mlm(["convert", *command, "--dry-run"]) == 0
    dry = json.loads(capsys.readouterr().out)
    assert not list(tmp_path.iterdir())
    assert mlm(["convert", *command]) == 0
    report = json.loads(capsys.readouterr().out)
    assert dry.items() <= report.items()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert report["parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert report["parameters"] == sum(param.numel() for param in model.parameters())
    assert report["files"] == {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert report["dtype"] == "bfloat16" and report["vocab_size"] == 400 and report["step"] is None
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_step_and_a_card_stay(source: tuple[Path, Any], tmp_path: Path) -> None:
    megatron.write(source[1], tmp_path / "there", iteration=77)
    with_vocabulary(tmp_path / "there", 400)
    assert convert(tmp_path / "there", tmp_path / "run", "--to", "mlm") == 0
    assert read_manifest(tmp_path / "run").step == 77
    (tmp_path / "run" / "model" / "README.md").write_text("license: mit\n| weights | float32 |\n")
    assert convert(tmp_path / "run", tmp_path / "out", "--to", "hf", "--dtype", "fp16") == 0
    assert (tmp_path / "out" / "README.md").read_text() == "license: mit\n| weights | float16 |\n"
    assert convert(tmp_path / "run", tmp_path / "again", "--to", "megatron") == 0
    assert (tmp_path / "again" / "latest_checkpointed_iteration.txt").read_text() == "77"
    assert (tmp_path / "again" / "iter_0000077" / "mp_rank_00" / "model_optim_rng.pt").is_file()


def test_a_release_without_args(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, there = save_folder(tmp_path / "gpt2", "gpt2", TEXTS), tmp_path / "there"
    megatron.write(model, there, iteration=None, args=False, version=0.0, names="old", legacy_file=True)
    assert convert(there, tmp_path / "out", "--to", "hf") == 4
    assert "model.num_attention_heads=N" in capsys.readouterr().err
    assert convert(there, tmp_path / "out", "--to", "hf", "model.num_attention_heads=4") == 4
    assert "vocabulary rows" in capsys.readouterr().err
    options = ("--to", "hf", "--tokenizer", tmp_path / "gpt2", "model.num_attention_heads=4", "model.vocab_size=400")
    assert convert(there, tmp_path / "out", *options) == 0
    assert greedy(tmp_path / "out") == their_greedy(model)
    assert load_tokenizer(tmp_path / "out").fingerprint == load_tokenizer(tmp_path / "gpt2").fingerprint


def pickled(folder: Path, target: Path, **extra: Any) -> Path:
    shutil.copytree(folder, target)
    state = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    torch.save({**state, **extra}, target / "pytorch_model.bin")
    return target


def test_pickled_weights_in_a_step_of_their_own(
    source: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = pickled(source[0], tmp_path / "old", buffer=torch.ones(3, dtype=torch.bool))
    assert convert(old, tmp_path / "new", "--to", "hf") == 4
    assert "--from-pickle" in capsys.readouterr().err
    assert convert(old, tmp_path / "new", "--to", "hf", "--from-pickle") == 0
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == (source[0] / "model.safetensors").read_bytes()

    state = torch.load(old / "pytorch_model.bin", weights_only=True)
    names = sorted(state)
    index = {"weight_map": {}}
    for number, part in enumerate((names[::2], names[1::2])):
        torch.save({name: state[name] for name in part}, old / f"pytorch_model-{number}.bin")
        index["weight_map"] |= dict.fromkeys(part, f"pytorch_model-{number}.bin")
    (old / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert convert(old, tmp_path / "sharded", "--to", "mlm", "--from-pickle") == 0
    (old / "pytorch_model-1.bin").unlink()
    assert convert(old, tmp_path / "lost", "--to", "mlm", "--from-pickle") == 4
    assert "pytorch_model-1.bin is missing" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"old", "new", "sharded"}


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_needs_more_is_refused(
    source: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = pickled(source[0], tmp_path / "old", trap=Trap(tmp_path / "sprung"))
    assert convert(old, tmp_path / "new", "--to", "hf", "--from-pickle") == 4
    assert "pytorch_model.bin" in (message := capsys.readouterr().err) and "holds more than weights" in message
    torch.save([torch.ones(2)], old / "pytorch_model.bin")
    assert convert(old, tmp_path / "new", "--to", "hf", "--from-pickle") == 4
    assert "dictionary of tensors" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"old"}


def test_classifiers_keep_their_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.generation.folders import save_tokenizer

    config = transformers.GPT2Config(
        vocab_size=400, n_positions=48, n_embd=32, n_layer=2, n_head=4, num_labels=3, pad_token_id=0,
        id2label={0: "no", 1: "perhaps", 2: "yes"}, label2id={"no": 0, "perhaps": 1, "yes": 2},
    )  # fmt: skip
    model = transformers.GPT2ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "theirs")
    assert convert(tmp_path / "theirs", tmp_path / "out", "--to", "hf") == 4  # no tokenizer
    save_tokenizer(tmp_path / "theirs", TEXTS)
    assert convert(tmp_path / "theirs", tmp_path / "out", "--to", "hf") == 0
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert again.config.id2label == config.id2label
    dry = ["convert", str(tmp_path / "theirs"), str(tmp_path / "x"), "--to", "hf", "--dry-run", "--format", "json"]
    capsys.readouterr()
    assert mlm(dry) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["architecture"] == "GPT2ForSequenceClassification"
    assert report["parameters"] == sum(param.numel() for param in model.parameters())
    ids = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
    capsys.readouterr()
    assert convert(tmp_path / "theirs", tmp_path / "meg", "--to", "megatron") == 2
    assert "no place for its head" in capsys.readouterr().err


def test_damage_goes_no_further(source: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flipped bit that no format check sees: a copy's manifest would vouch for it, and answers come all the same."""
    assert convert(source[0], tmp_path / "run", "--to", "mlm") == 0
    capsys.readouterr()
    weights = tmp_path / "run" / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (tmp_path / "ft.tsv").write_text("text\tlabel\na\tx\nb\ty\n")
    task = f"{{name: classification, train: {tmp_path}/ft.tsv, dev: {tmp_path}/ft.tsv}}"
    recipe = f"init_from: {tmp_path}/run\ntask: {task}\ntrain: {{steps: 1}}\n"
    (tmp_path / "ft.yaml").write_text(recipe + f"output: {tmp_path}/ft\n")
    for command in (
        ["convert", f"{tmp_path}/run", f"{tmp_path}/out", "--to", "hf"],
        ["finetune", f"{tmp_path}/ft.yaml"],
        ["generate", f"{tmp_path}/run", "--prompt", "a"],
        ["evaluate", f"{tmp_path}/run", "--task", "perplexity", "--data", f"{tmp_path}/ft.tsv"],
    ):
        assert mlm(command) == 4
        said = capsys.readouterr()
        assert said.out == "" and "model/model.safetensors has another sha256" in said.err
    assert not (tmp_path / "out").exists()


def test_mistakes_write_nothing(source: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = source
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    (tmp_path / "plain").touch()
    out = tmp_path / "out"
    for code, words, said in (
        (2, (folder, out), "no target layout"),
        (2, (folder, "--to", "hf"), "no DST"),
        (2, (folder, out, "third", "--to", "hf"), "one word too many"),
        (2, (folder, tmp_path / "taken", "--to", "hf"), "exists already"),
        (2, (folder, tmp_path / "plain", "--to", "hf"), "exists already"),
        (2, (folder, tmp_path / "plain" / "in", "--to", "hf"), "cannot be made"),
        (2, (folder, out, "--to", "hf", "--tensor", 2), "--tensor"),
        (2, (folder, out, "--to", "megatron", "--tensor", 3), "cannot share"),
        (2, (folder, out, "--to", "megatron", "--pipeline", 2), "3 layers cannot fill 2"),
        (2, (folder, out, "--to", "megatron", "--checkpoint-version", 1.5), "1.5 is unknown"),
        (2, (folder, out, "--to", "hf", "model.num_layers=3"), "model.num_layers is known"),
        (2, (folder, out, "--to", "hf", "train.steps=3"), "train.steps"),
        (4, (tmp_path / "a" / "b", out, "--to", "hf"), "no model folder"),
        (4, (tmp_path / "taken", out, "--to", "hf"), "holds no model"),
        (4, (folder, out, "--to", "hf", "--from-pickle"), "pytorch_model.bin"),
        (3, (folder, out, "--to", "hf", "--tokenizer", tmp_path / "none.json"), "none.json"),
    ):
        assert convert(*words) == code, words
        err = capsys.readouterr().err
        assert said in err and err.startswith("error:"), err
    assert {path.name for path in tmp_path.iterdir()} == {"taken", "plain"}


def test_a_failure_half_way_leaves_nothing(
    source: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import errno

    real, written = torch.save, []

    def full_disk(*arguments: Any, **options: Any) -> None:
        written.append(1)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments, **options)

    monkeypatch.setattr(torch, "save", full_disk)
    assert convert(source[0], tmp_path / "out", "--to", "megatron", "--tensor", 2) == 7
    assert "disk is full" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def in_slices(run_ranks: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two ranks make of each random model, as tensor slices and as stages, beside what `transformers` does."""
    folder, wanted = tmp_path_factory.mktemp("slices"), {}
    for kind in THEIRS:
        model = theirs(kind)
        model.save_pretrained(folder / f"{kind}.theirs")
        prompt = tokens(101)[:1, :6]
        seen = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
        with torch.no_grad():
            wanted[kind] = seen.tolist(), model(seen[:, :-1]).logits.numpy()
    for kind in ("gpt2", "llama"):
        for layout in LAYOUTS:
            where = folder / f"{kind} {layout}.megatron"
            megatron.write(random_model(kind), where, tensor=layout[0], pipeline=layout[1])
            with_vocabulary(where)
        wanted[f"{kind} megatron"] = expected(random_model(kind)).numpy()
    prompt = tokens(101)[:1, :6].tolist()
    return folder, wanted, run_ranks(read_write_and_continue, 2, str(folder), prompt, TOKENS.tolist())


@pytest.mark.parametrize("layout", ["tensor 2", "pipeline 2"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_any_layout_reads_any_of_megatron(in_slices: Any, kind: str, layout: str) -> None:
    _, wanted, answers = in_slices
    for answer in answers:
        for written in LAYOUTS:
            found = answer[f"{kind} {written}", layout]
            np.testing.assert_allclose(found, wanted[f"{kind} megatron"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["tensor 2", "pipeline 2"])
@pytest.mark.parametrize("kind", THEIRS)
def test_transformers_and_back_in_slices_and_stages(in_slices: Any, kind: str, layout: str) -> None:
    folder, wanted, answers = in_slices
    seen, logits = wanted[kind]
    for answer in answers:
        assert answer[kind, layout]["seen"] == seen
        np.testing.assert_allclose(answer[kind, layout]["logits"], logits, rtol=1e-4, atol=1e-4)
    first = load_file(folder / f"{kind}.theirs" / "model.safetensors")
    again = load_file(folder / f"{kind}.{layout}" / "model.safetensors")
    assert first.keys() <= again.keys() and all(again[name].equal(value) for name, value in first.items())


@pytest.mark.parametrize("name", ["token_classification", "multiple_choice", "embedding"])
def test_every_kind_of_task_is_carried_over(tmp_path: Path, name: str) -> None:
    from tasks.task_models import SECTIONS, make_model, make_task, wordpiece

    from mlm_cli.tasks.task_folder import save_task_model

    task = make_task(
        name, SECTIONS["bert"], wordpiece(tmp_path / "tok"), **({"pooling": "cls"} if name == "embedding" else {})
    )
    save_task_model(make_model("bert", task), task, tmp_path / "in")
    assert convert(tmp_path / "in", tmp_path / "out", "--to", "hf") == 0
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "in" / file).read_bytes()


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # what must be the same after the way through ours
    "GPT2LMHeadModel": (
        {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32},
        {"resid_pdrop": 0.2, "attn_pdrop": 0.3, "eos_token_id": [0, 7]},
    ),
    "LlamaForCausalLM": (
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4},
        {"attention_dropout": 0.25, "eos_token_id": 5},
    ),
    "BertForMaskedLM": (
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4},
        {"hidden_dropout_prob": 0.15, "attention_probs_dropout_prob": 0.05},
    ),
    "T5ForConditionalGeneration": (
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
        {"dropout_rate": 0.3, "decoder_start_token_id": 9, "eos_token_id": 6},
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("to", ["hf", "mlm"])
def test_settings_of_training_and_generation_stay(name: str, to: str, tmp_path: Path) -> None:
    from tests.generation.folders import save_tokenizer

    sizes, kept = SETTINGS[name]
    cls = getattr(transformers, name)
    model = cls(cls.config_class(vocab_size=400, **sizes, **kept))
    model.save_pretrained(tmp_path / "theirs")
    save_tokenizer(tmp_path / "theirs", TEXTS)
    assert convert(tmp_path / "theirs", tmp_path / "out", "--to", to) == 0
    inner = tmp_path / "out" / ("model" if to == "mlm" else "")
    config = json.loads((inner / "config.json").read_text())
    assert {key: config[key] for key in kept} == kept
    if to == "mlm":
        assert not find_damage(tmp_path / "out", read_manifest(tmp_path / "out"))
