"""Bad folders of a BERT of Megatron-LM, through `mlm convert`: one error naming file and tensor, and exit code 4."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint import megatron_oracle_files as megatron
from tests.checkpoint.test_megatron import with_vocabulary
from tests.checkpoint.test_megatron_bert import theirs
from tests.checkpoint.test_megatron_damage import edit, edit_all, encoder
from tests.jobs.test_convert import convert
from tests.jobs.test_convert_bert import refusal

LAST = ("00_001", "01_001")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    megatron.write(theirs("tanh"), folder, tensor=2, pipeline=2)
    return with_vocabulary(folder)


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "checkpoint"))


def each(ranks: tuple[str, ...], change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for rank in ranks:
            edit(folder, change, rank)

    return damage


def args(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_all(folder, lambda state: vars(state["args"]).update(changes))


def lm(state: dict[str, Any]) -> Any:
    return state["model"]["language_model"]


QKV = "layers.1.self_attention.query_key_value.bias"
DAMAGE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "head missing": (
        each(LAST, lambda s: s["model"]["lm_head"].pop("dense.weight")),
        ["mp_rank_00_001", "tensor lm_head.dense.weight is missing"],
    ),
    "whole head missing": (
        each(LAST, lambda s: s["model"].pop("lm_head")), ["mp_rank_00_001", "tensor lm_head.", "is missing"],
    ),
    "binary head missing": (
        each(LAST, lambda s: s["model"].pop("binary_head")), ["mp_rank_00_001", "binary_head.weight is missing"],
    ),
    "pooler missing": (each(LAST, lambda s: lm(s).pop("pooler")), ["mp_rank_00_001", "pooler.dense.weight is missing"]),
    "types missing": (
        each(("00_000", "01_000"), lambda s: lm(s)["embedding"].pop("tokentype_embeddings")),
        ["mp_rank_00_000", "tokentype_embeddings.weight is missing"],
    ),
    "layer's missing": (
        each(LAST, lambda s: encoder(s).pop(QKV)),
        ["mp_rank_00_001", "language_model.encoder.layers.3.self_attention.query_key_value.bias is missing"],
    ),
    "one rank's missing": (
        each(("01_001",), lambda s: s["model"]["lm_head"].pop("bias")), ["mp_rank_01_001", "lm_head.bias is missing"],
    ),
    "extra": (
        each(LAST, lambda s: s["model"]["lm_head"].update(scale=torch.ones(1))),
        ["mp_rank_00_001", "unexpected tensor lm_head.scale"],
    ),
    "no binary head by its args": (args(bert_binary_head=False), ["mp_rank_00_001", "unexpected tensor binary_head."]),
    "bias of another vocabulary": (
        each(("01_001",), lambda s: s["model"]["lm_head"].update(bias=torch.zeros(40))),
        ["mp_rank_01_001", "lm_head.bias has shape [40]", "[52]"],
    ),
    "words of another vocabulary": (
        each(("01_000",), lambda s: lm(s)["embedding"]["word_embeddings"].update(weight=torch.zeros(60, 32))),
        ["word_embeddings"],
    ),
    "tied words that differ": (
        each(("01_001",), lambda s: s["model"]["word_embeddings_for_head"]["weight"].add_(1)),
        ["word_embeddings_for_head.weight is not a copy"],
    ),
    "pooler's shape": (
        each(LAST, lambda s: lm(s)["pooler"].update({"dense.weight": torch.zeros(32, 16)})),
        ["mp_rank_00_001", "language_model.pooler.dense.weight has shape [32, 16]", "[32, 32]"],
    ),
    "untied": (args(untie_embeddings_and_output_weights=True), ["model.tie_embeddings: False"]),
    "rotary": (args(position_embedding_type="rope"), ["model.position: rotary", "learned"]),
    "gated": (args(swiglu=True), ["model.activation: swiglu"]),
    "no biases": (args(add_bias_linear=False), ["model.bias: False"]),
    "another norm": (args(normalization="RMSNorm"), ["model.norm: rmsnorm"]),
    "post-norm": (args(apply_residual_connection_post_layernorm=True), ["apply_residual_connection_post_layernorm"]),
    "an unknown task of the head": (args(mlm_binary_head="both"), ["binary_head", "both"]),
    "a task's head": (
        each(LAST, lambda s: s["model"].update(classification_head={"weight": torch.zeros(3, 32)})),
        ["unknown architecture (tensor classification_head.weight)"],
    ),
    "a larger tokenizer": (lambda f: with_vocabulary(f, 105), ["104 rows, the vocabulary 105 tokens"]),
    "a smaller tokenizer": (lambda f: with_vocabulary(f, 90), ["104 rows, the tokenizer 90 tokens"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["104 vocabulary rows"]),
    "truncated": (
        lambda f: (p := next(f.glob("*/mp_rank_01_001/*.pt"))).write_bytes(p.read_bytes()[:-99]),
        ["mp_rank_01_001", "truncated or corrupt"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_bad_folders(folder: Path, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, words = DAMAGE[kind]
    damage(folder)
    err = refusal(folder, tmp_path / "out", capsys)
    assert str(folder) in err and all(word in err for word in words), err


def test_another_tokenizer(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the vocabulary 257 tokens" in refusal(folder, tmp_path / "out", capsys, "--tokenizer", "bytes")
    assert convert(folder, tmp_path / "out", "--to", "hf") == 0  # the sound one
