"""``mlm convert`` of BERT between transformers, mlm and Megatron-LM; what a target cannot hold; bad folders of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models.bert_models import SECTIONS, make_batch, shake
from safetensors.torch import load_file, save_file

from mlm_cli.checkpoint.hub import load_model_folder, save_model_folder
from mlm_cli.checkpoint.manifest import find_damage, read_manifest
from mlm_cli.config.schema import ModelSection
from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.models.registry import build_model
from tests.checkpoint import megatron_oracle_files as megatron
from tests.checkpoint.bert_in_slices import read_and_write
from tests.checkpoint.megatron_bert_oracle import attention_hidden
from tests.checkpoint.test_hub import ONE
from tests.checkpoint.test_hub_bert import THEIRS, check_equal, open_theirs, their_class, their_output
from tests.checkpoint.test_megatron import with_vocabulary
from tests.checkpoint.their_sizes import THEIR_SIZES
from tests.jobs.test_convert import convert

transformers = pytest.importorskip("transformers")

VOCAB = 101
PRE_NORM = [kind for kind in THEIRS if kind.startswith("megatron")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model of each kind as `transformers` saves it, with a tokenizer."""
    made = {}
    for kind, (name, settings) in THEIRS.items():
        cls = getattr(transformers, name)
        torch.manual_seed(1)
        model = cls(cls.config_class(**{**THEIR_SIZES, **settings})).eval()
        shake(model)
        made[kind] = tmp_path_factory.mktemp("theirs") / kind
        model.save_pretrained(made[kind])
        with_vocabulary(made[kind])
    return made


def check_same(folder: Path, original: Path) -> None:
    """`transformers` opens ``folder`` with the class and every tensor of ``original``."""
    assert their_class(folder) is their_class(original)
    first, again = (open_theirs(place).state_dict() for place in (original, folder))
    assert first.keys() == again.keys()
    for name, tensor in first.items():
        assert again[name].equal(tensor), name


@pytest.mark.parametrize("kind", THEIRS)
def test_there_and_back(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    run, back = tmp_path / "run", tmp_path / "back"
    assert convert(folders[kind], run, "--to", "mlm") == 0
    assert not find_damage(run, read_manifest(run))
    model, section = load_model_folder(run / "model", ONE)
    assert section.vocab_size == VOCAB
    check_equal(model.eval(), open_theirs(folders[kind]))
    assert convert(run, back, "--to", "hf") == 0
    check_same(back, folders[kind])
    assert load_tokenizer(back).fingerprint == load_tokenizer(folders[kind]).fingerprint


@pytest.mark.parametrize("kind", SECTIONS)
def test_ours_for_transformers(kind: str, tmp_path: Path) -> None:
    model = build_model(SECTIONS[kind], ONE).eval()
    shake(model)
    save_model_folder(model, tmp_path / "ours")
    assert convert(tmp_path / "ours", tmp_path / "out", "--to", "hf") == 0
    check_equal(model, open_theirs(tmp_path / "out"))


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("kind", PRE_NORM)
def test_through_megatron(folders: dict[str, Path], kind: str, tensor: int, pipeline: int, tmp_path: Path) -> None:
    there, back, run = tmp_path / "megatron", tmp_path / "back", tmp_path / "run"
    assert convert(folders[kind], there, "--to", "megatron", "--tensor", tensor, "--pipeline", pipeline) == 0
    assert len(list(there.glob("release/mp_rank_*/model_optim_rng.pt"))) == tensor * pipeline
    theirs = open_theirs(folders[kind])
    section = ModelSection(family="bert", seq_length=24, vocab_size=VOCAB, binary_head="sentence_order")
    batch = make_batch(section.model_copy(update={"binary_head": "none"} if "words" in kind else {}), 5)
    out, wanted = their_output(theirs, batch)
    hidden = attention_hidden(batch["lengths"], 24)
    words, binary = megatron.logits(there / "release", batch["tokens"], batch["token_types"], hidden)
    real = torch.arange(24) < batch["lengths"][:, None]
    torch.testing.assert_close(words[real][:, :VOCAB], wanted[real], rtol=1e-4, atol=1e-4)
    assert (binary is None) == ("words" in kind)
    if binary is not None:
        torch.testing.assert_close(binary, out.seq_relationship_logits, rtol=1e-4, atol=1e-4)
    check_equal(load_model_folder(there, ONE)[0].eval(), theirs)  # a folder of Megatron-LM is a MODEL
    assert convert(there, back, "--to", "hf") == 0
    check_same(back, folders[kind])
    assert convert(there, run, "--to", "mlm") == 0
    assert (run / "model" / "model.safetensors").read_bytes() == (back / "model.safetensors").read_bytes()


@pytest.mark.parametrize("version", [0.0, 1.0, 2.0, 3.0])
def test_every_age_of_the_layout(folders: dict[str, Path], version: float, tmp_path: Path) -> None:
    options = ("--to", "megatron", "--checkpoint-version", version, "--tensor", 2)
    assert convert(folders["megatron"], tmp_path / "there", *options) == 0
    assert convert(tmp_path / "there", tmp_path / "back", "--to", "hf") == 0
    check_same(tmp_path / "back", folders["megatron"])


def test_in_slices(folders: dict[str, Path], run_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    """At tensor size 2 every form of every model reads as at 1, and is written as it was."""
    places: dict[str, Path] = {}
    for kind, folder in folders.items():
        places[f"{kind} run"] = tmp_path / f"{kind}.run" / "model"
        assert convert(folder, tmp_path / f"{kind}.run", "--to", "mlm") == 0
        places[f"{kind} hf"] = tmp_path / f"{kind}.hf"
        shutil.copytree(folder, tmp_path / f"{kind}.hf")
        for tensor in (1, 2) if kind in PRE_NORM else ():
            places[f"{kind} {tensor}"] = tmp_path / f"{kind}.{tensor}"
            assert convert(folder, places[f"{kind} {tensor}"], "--to", "megatron", "--tensor", tensor) == 0
    section = ModelSection(family="bert", seq_length=24, vocab_size=VOCAB)
    batches = {
        binary: make_batch(section.model_copy(update={"binary_head": binary}), 5)
        for binary in ("none", "sentence_order")
    }
    inputs = {name: batches["none"][name].tolist() for name in ("tokens", "lengths", "token_types")}
    answers = run_ranks(read_and_write, 2, [str(place) for place in places.values()], inputs)
    real = (torch.arange(24) < batches["none"]["lengths"][:, None]).numpy()
    for form, place in places.items():
        kind = form.rpartition(" ")[0]
        out, wanted = their_output(open_theirs(folders[kind]), batches["none" if "words" in kind else "sentence_order"])
        for answer in answers:
            words, binary = answer[str(place)]
            np.testing.assert_allclose(words[real], wanted.numpy()[real], rtol=1e-4, atol=1e-4)
            assert (binary is None) == ("words" in kind)
            if binary is not None:
                np.testing.assert_allclose(binary, out.seq_relationship_logits.numpy(), rtol=1e-4, atol=1e-4)
        if (place / "config.json").is_file():
            check_same(place.with_name(f"{place.name}.again"), folders[kind])


SMALL: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 24, "vocab_size": 101,
}  # fmt: skip
LLAMA: dict[str, Any] = {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False}
T5: dict[str, Any] = {"position": "relative", "norm": "rmsnorm", "activation": "relu", "bias": False}
SCALED = {"type": "yarn", "factor": 2.0, "original_seq_length": 12}
BEYOND: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "experts": ({"experts": {"num_experts": 4}}, dict.fromkeys(("hf", "megatron"), "a mixture of experts")),
    "sparse": ({"attention": {"pattern": "local", "window": 8}}, dict.fromkeys(("hf", "megatron"), "sparse attention")),
    "sparse bert": (
        {"family": "bert", "num_token_types": 2, "attention": {"pattern": "bigbird", "window": 8, "block": 4}},
        dict.fromkeys(("hf", "megatron"), "sparse attention"),
    ),
    "dense by name": ({"attention": {"pattern": "dense", "kernel": "sdpa"}}, {}),
    "scaled": (
        {**LLAMA, "rotary_scaling": SCALED},
        {"megatron": "scaled rotary positions (model.rotary_scaling: type='yarn'"},
    ),
    "post-norm": (
        {"family": "bert", "num_token_types": 2, "norm_order": "post"},
        {"megatron": "model.norm_order: post"},
    ),
    "t5": (
        {**T5, "family": "t5", "num_decoder_layers": 1, "decoder_seq_length": 12},
        {"megatron": "model.family: t5"},
    ),
    "untied": ({"family": "bert", "num_token_types": 2, "tie_embeddings": False}, {"megatron": "model.tie_embeddings"}),
}


@pytest.mark.parametrize("kind", BEYOND)
def test_what_a_target_cannot_express(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, refused = BEYOND[kind]
    model = build_model(ModelSection(**{**SMALL, **settings}), ONE)
    save_model_folder(model, tmp_path / "ours")
    with_vocabulary(tmp_path / "ours")
    for to in ("hf", "megatron", "mlm"):
        capsys.readouterr()
        for extra in (["--dry-run"], []):
            assert convert(tmp_path / "ours", tmp_path / to, "--to", to, *extra) == (2 if to in refused else 0)
            err = capsys.readouterr().err
            assert (refused[to] in err and "hint: `--to mlm` keep" in err) if to in refused else "error" not in err
        assert (tmp_path / to).exists() == (to not in refused)
    again, section = load_model_folder(tmp_path / "mlm" / "model", ONE)
    filled = {"ffn_hidden_size", "head_dim", "num_query_groups", "rotary_scaling"}
    assert section.model_dump(exclude=filled) == model.config.model_dump(exclude=filled)
    assert all(
        param.equal(mine)
        for param, mine in zip(again.parameters(), model.parameters(), strict=True)
        if param.dim() == 1
    )


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors")


QUERY = "bert.encoder.layer.1.attention.self.query.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "missing": (lambda f: edit_weights(f, lambda s: s.pop(QUERY)), ["model.safetensors", QUERY, "missing"]),
    "missing head": (
        lambda f: edit_weights(f, lambda s: s.pop("cls.seq_relationship.bias")),
        ["cls.seq_relationship.bias", "missing"],
    ),
    "extra": (
        lambda f: edit_weights(f, lambda s: s.update({"bert.encoder.layer.2.ln.bias": torch.zeros(32)})),
        ["model.safetensors", "unexpected tensor bert.encoder.layer.2.ln.bias"],
    ),
    "shape": (
        lambda f: edit_weights(f, lambda s: s.update({QUERY: torch.zeros(16, 32)})),
        [QUERY, "[16, 32]", "[32, 32]"],
    ),
    "architecture": (
        lambda f: edit_config(f, model_type="roberta", architectures=["RobertaForMaskedLM"]),
        ["config.json", "unknown architecture RobertaForMaskedLM", "known model types"],
    ),
    "layers": (lambda f: edit_config(f, num_hidden_layers=3), ["bert.encoder.layer.2.", "missing"]),
    "width": (lambda f: edit_config(f, intermediate_size=48), ["intermediate.dense.weight", "[44, 32]", "[48, 32]"]),
    "types": (lambda f: edit_config(f, type_vocab_size=3), ["token_type_embeddings.weight", "[2, 32]", "[3, 32]"]),
    "activation": (lambda f: edit_config(f, hidden_act="relu"), ["config.json", "hidden_act: relu"]),
    "decoder": (lambda f: edit_config(f, is_decoder=True), ["config.json", "is_decoder"]),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        ["model.safetensors", "truncated or corrupt"],
    ),
    "tokenizer": (lambda f: with_vocabulary(f, 102), ["101 tokens", "102"]),
}  # fmt: skip


def refusal(folder: Path, out: Path, capsys: pytest.CaptureFixture[str], *options: object) -> str:
    """What `mlm convert` says of a bad folder: one error, exit code 4, and nothing is left behind."""
    capsys.readouterr()
    assert convert(folder, out, "--to", "hf", *options) == 4
    err = capsys.readouterr().err
    assert err.startswith("error:") and err.count("error:") == 1 and "Traceback" not in err
    assert not list(out.parent.glob(f"*{out.name}*"))
    return err


@pytest.mark.parametrize("kind", DAMAGE)
def test_bad_folders_of_transformers(
    folders: dict[str, Path], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(folders["megatron"], tmp_path / "bad"))
    damage, words = DAMAGE[kind]
    damage(folder)
    err = refusal(folder, tmp_path / "out", capsys)
    assert str(folder) in err and all(word in err for word in words), err
