"""Bad model folders: one error that names the file and the tensor, never a wrong model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlm_cli.checkpoint.hub import check_vocabulary, load_model_folder, save_model_folder
from mlm_cli.config.schema import ModelSection
from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.errors import CheckpointError
from mlm_cli.models.registry import build_gpt
from mlm_cli.parallel.context import ParallelContext

ONE = ParallelContext.single()
LLAMA: dict[str, Any] = {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path, {})
    return tmp_path


def save(folder: Path, settings: dict[str, Any], **options: Any) -> None:
    sizes = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 8, "vocab_size": 50}
    save_model_folder(build_gpt(ModelSection(**sizes, **settings), ONE), folder, **options)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "DELETE"}))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    edit(state)
    save_file(state, path)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model_folder(folder, ONE)
    assert str(folder) in caught.value.message
    return caught.value.message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, ["unknown architecture", "MambaForCausalLM"]),
        ({"model_type": "DELETE"}, ["unknown architecture"]),
        ({"n_layer": "DELETE"}, ["`n_layer` is missing"]),
        ({"n_layer": "two"}, ["`n_layer`", "'two'"]),
        ({"n_layer": True}, ["`n_layer`", "True"]),
        ({"n_embd": 0}, ["hidden_size"]),
        ({"n_embd": 32}, ["transformer.wte.weight", "[50, 16]", "[50, 32]"]),
        ({"n_layer": 2}, ["transformer.h.1.ln_1.weight", "missing"]),
        ({"n_inner": 48}, ["transformer.h.0.mlp.c_fc.weight", "[16, 64]", "[16, 48]"]),
        ({"vocab_size": 60}, ["transformer.wte.weight", "[50, 16]", "[60, 16]"]),
        ({"activation_function": "relu"}, ["activation_function: relu"]),
        ({"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
        ({"scale_attn_weights": False}, ["scale_attn_weights"]),
        ({"tie_word_embeddings": False}, ["lm_head.weight", "missing"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"activation_function": ["gelu"]}, ["activation_function"]),
        ({"n_head": 17}, ["17 attention heads", "16"]),
        # of another model: what is there is compared before memory for what is asked for is taken
        ({"vocab_size": 10**12}, ["transformer.wte.weight", "[50, 16]", f"[{10**12}, 16]"]),
        ({"n_embd": 10**12}, ["config.json"]),
        ({"num_attention_heads": 4}, ["num_attention_heads: 4", "n_head"]),
        ({"n_inner": 10**12}, ["transformer.h.0.mlp.c_fc.weight", "[16, 64]", f"[16, {10**12}]"]),
        ({"n_positions": 10**12}, ["transformer.wpe.weight", "[8, 16]"]),
        ({"n_layer": 10**12}, [f"{10**12} layers", "model.safetensors holds 16 tensors"]),
    ],
    ids=str,
)
def test_config_that_does_not_fit(folder: Path, changes: dict[str, Any], words: list[str]) -> None:
    edit_config(folder, **changes)
    message = refusal(folder)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, ["hidden_act: gelu"]),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, ["llama3"]),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, ["factor"]),
        ({"num_key_value_heads": 1}, ["self_attn.k_proj.weight", "[16, 16]", "[8, 16]"]),
        ({"attention_bias": True}, ["self_attn.q_proj.bias", "missing"]),
    ],
    ids=str,
)
def test_llama_config_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    save(tmp_path, LLAMA)
    edit_config(tmp_path, **changes)
    message = refusal(tmp_path)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("settings", [{}, LLAMA], ids=["gpt2", "llama"])
def test_an_output_layer_that_config_json_denies(tmp_path: Path, settings: dict[str, Any]) -> None:
    """transformers 5 would take it, 4 would not."""
    words = "model.embed_tokens.weight" if settings else "transformer.wte.weight"
    save(tmp_path, settings)
    edit_weights(tmp_path, lambda s: s.update({"lm_head.weight": s[words].clone()}))
    load_model_folder(tmp_path, ONE)
    edit_weights(tmp_path, lambda s: s["lm_head.weight"].add_(1))
    assert f"lm_head.weight is not {words}" in refusal(tmp_path)
    load_model_folder(tmp_path, ONE, head=False)


def test_one_file_is_read_before_an_index(tmp_path: Path) -> None:
    """As transformers does where both are there."""
    save(tmp_path, {}, max_shard_bytes=4000)
    sharded, _ = load_model_folder(tmp_path, ONE)
    save(tmp_path, {"init_std": 0.5})
    whole, _ = load_model_folder(tmp_path, ONE)
    stored = load_file(tmp_path / "model.safetensors")["transformer.wpe.weight"]
    assert whole.state_dict()["embedding.position.weight"].equal(stored)
    assert not sharded.state_dict()["embedding.position.weight"].equal(stored)


def test_tensors_that_do_not_fit(folder: Path) -> None:
    original = (folder / "model.safetensors").read_bytes()
    edits: list[tuple[Callable[[dict[str, torch.Tensor]], Any], list[str]]] = [
        (lambda s: s.pop("transformer.h.0.attn.c_attn.bias"), ["transformer.h.0.attn.c_attn.bias", "missing"]),
        (lambda s: s.update(extra=torch.zeros(2)), ["unexpected tensor extra"]),
        (lambda s: s.update({"transformer.ln_f.weight": torch.zeros(15)}), ["transformer.ln_f.weight", "[15]", "[16]"]),
        (lambda s: s.update({"transformer.ln_f.bias": torch.zeros(16, dtype=torch.int8)}), ["ln_f.bias", "I8"]),
        (lambda s: s.update({"transformer.wpe.weight": torch.zeros(16, 8)}), ["wpe.weight", "[16, 8]", "[8, 16]"]),
    ]
    for edit, words in edits:
        (folder / "model.safetensors").write_bytes(original)
        edit_weights(folder, edit)
        message = refusal(folder)
        assert "model.safetensors" in message and all(word in message for word in words), message


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(folder)
    assert "model.safetensors" in message and "truncated or corrupt" in message


def test_garbage_in_place_of_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x80\x02}q\x00." * 99)
    assert "truncated or corrupt" in refusal(folder)


def test_pickled_weights_are_never_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\ufffe", "[" * 100_000], ids=range(5))
def test_config_that_is_no_json_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-16") if text == "\ufffe" else text.encode())
    assert "config.json" in refusal(folder)


def test_missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "config.json" in refusal(folder)


def test_biases_of_a_model_without_them_must_be_zero(tmp_path: Path) -> None:
    save(tmp_path, {"bias": False})
    load_model_folder(tmp_path, ONE)
    edit_weights(tmp_path, lambda s: s["transformer.h.0.mlp.c_fc.bias"].fill_(0.5))
    assert "transformer.h.0.mlp.c_fc.bias is not zero" in refusal(tmp_path)


def test_damaged_index(tmp_path: Path) -> None:
    save(tmp_path, {}, max_shard_bytes=4000)
    index = tmp_path / "model.safetensors.index.json"
    original = index.read_text()
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2

    lost = shards[1].read_bytes()
    shards[1].unlink()
    message = refusal(tmp_path)
    assert shards[1].name in message and "missing" in message
    shards[1].write_bytes(lost[:-10])
    assert shards[1].name in refusal(tmp_path)
    shards[1].write_bytes(lost)
    load_model_folder(tmp_path, ONE)

    mapping = json.loads(original)
    name, file = next(iter(mapping["weight_map"].items()))
    other = next(shard.name for shard in shards if shard.name != file)
    for change, words in (
        ({name: other}, [other, name]),
        ({name: "../outside.safetensors"}, [name, "outside the folder"]),
        ({name: 7}, ["weight_map"]),
    ):
        index.write_text(json.dumps({**mapping, "weight_map": mapping["weight_map"] | change}))
        message = refusal(tmp_path)
        assert all(word in message for word in words), message
    index.write_text("{}")
    assert "weight_map" in refusal(tmp_path)


def test_vocabulary_that_does_not_fit_the_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    model, _ = load_model_folder(folder, ONE)
    with pytest.raises(CheckpointError, match="50 tokens"):
        check_vocabulary(model.config, tokenizer, str(folder))
    with pytest.raises(CheckpointError, match="50 tokens"):
        save_model_folder(model, folder / "again", tokenizer)


def test_a_full_disk_is_an_operating_system_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        save(tmp_path / "file" / "model", {})
