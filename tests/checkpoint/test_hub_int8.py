"""Int8 weights on the disk: what is written, what transformers makes of it, and reading it whole or in slices."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import bert_models, t5_models
from safetensors.torch import load_file, save_file

from mlm_cli.checkpoint.hub import load_model_folder, read_model_config, save_model_folder
from mlm_cli.checkpoint.hub_write import refuse_inexpressible
from mlm_cli.config.schema import ModelSection
from mlm_cli.errors import CheckpointError, UsageError
from mlm_cli.models.model import Model
from mlm_cli.models.registry import build_model
from mlm_cli.ops import dequantize_rows, quantize_rows
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.layers import ParallelLinear
from tests.checkpoint.int8_in_slices import read

ONE = ParallelContext.single()
SIZES: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 24, "vocab_size": 259,
}  # fmt: skip
LLAMA: dict[str, Any] = {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False}
SECTIONS = {
    "gpt2": ModelSection(**SIZES),
    "gpt2 untied": ModelSection(**SIZES, tie_embeddings=False, ffn_hidden_size=56),
    "llama": ModelSection(**SIZES, **LLAMA, num_query_groups=2),
    "llama untied": ModelSection(**SIZES, **{**LLAMA, "bias": True, "tie_embeddings": False}),
    "bert": bert_models.SECTIONS["original"],
    "megatron untied": bert_models.SECTIONS["megatron untied"],
    "t5": t5_models.SECTIONS["v1.1"],
}
IDS = [[5, 9, 200, 31, 17, 40, 41, 42], [2, 2, 130, 140, 7, 7, 1, 0]]


def make(kind: str, dtype: torch.dtype = torch.float32) -> Model:
    model = build_model(SECTIONS[kind], ONE)
    t5_models.shake(model)
    return model.to(dtype).eval()


def layers_of(model: Model) -> dict[str, ParallelLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ParallelLinear)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", SECTIONS)
def test_there_and_back(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Matrices of the layers within half a step of what they were, all else as it was; again and again the same."""
    model = make(kind, dtype)
    save_model_folder(model, tmp_path / "int8", int8=True)
    stored = load_file(tmp_path / "int8" / "model.safetensors")
    codes = {name for name, tensor in stored.items() if tensor.dtype == torch.int8}
    assert all(stored[f"{name}_scale"].shape == (len(stored[name]), 1) for name in codes)
    assert all(tensor.dtype == dtype for name, tensor in stored.items() if name not in codes)

    floats, _ = load_model_folder(tmp_path / "int8", ONE, dtype=torch.float32)
    kept, section = load_model_folder(tmp_path / "int8", ONE, dtype=dtype, keep_int8=True)
    assert section.model_dump() == read_model_config(tmp_path / "int8")[0].model_dump()
    for name, layer in layers_of(kept).items():
        assert layer.weight.dtype == torch.int8 and layer.weight_scale is not None
        read_as_float, original = layers_of(floats)[name].weight, layers_of(model)[name].weight
        step = layer.weight_scale.double()[:, None]
        assert read_as_float.equal(layer.matrix(torch.float32))
        assert ((original.double() - layer.weight.double() * step).abs() <= step / 2).all()
    plain = dict(model.named_parameters())
    others = {name: param for name, param in floats.named_parameters() if param.ndim < 2 or "layers." not in name}
    valid = {name: param for name, param in others.items() if name.rpartition(".")[0] not in layers_of(model)}
    assert len(valid) > 5
    for name, param in valid.items():
        rows = model.vocab_size if param.shape[0] > model.vocab_size else None
        assert param[:rows].equal(plain[name][:rows].float()), name

    save_model_folder(kept, tmp_path / "kept")
    save_model_folder(kept, tmp_path / "int8 of int8", int8=True)
    for again in ("kept", "int8 of int8"):
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / again / file).read_bytes() == (tmp_path / "int8" / file).read_bytes()


def test_what_is_int8_and_what_is_not(tmp_path: Path) -> None:
    save_model_folder(make("llama untied"), tmp_path, int8=True, max_shard_bytes=8000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    stored = {name: tensor for file in set(index.values()) for name, tensor in load_file(tmp_path / file).items()}
    assert set(stored) == set(index)
    parts = [*(f"self_attn.{part}_proj" for part in "qkvo"), *(f"mlp.{part}_proj" for part in ("gate", "up", "down"))]
    wanted = {f"model.layers.{i}.{part}.weight" for i in range(2) for part in parts}
    assert {name for name, tensor in stored.items() if tensor.dtype == torch.int8} == wanted
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "float32" and config["quantization_config"]["ignore"] == [
        "lm_head",
        "qa_outputs",
        "score",
    ]
    card = (tmp_path / "README.md").read_text()
    assert "| weights | int8 in the layers (compressed-tensors), float32 elsewhere |" in card
    assert "Opens as `LlamaForCausalLM` in `transformers`" in card


def test_a_gpt2_is_for_mlm_alone(tmp_path: Path) -> None:
    """transformers would take int8 for the weights of its Conv1D modules, and only warn: it must not open it."""
    save_model_folder(make("gpt2"), tmp_path, int8=True)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mlm"
    assert "transformers" not in (tmp_path / "README.md").read_text().partition("## The model")[0].partition("# A")[2]
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="mlm"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(UsageError, match="linear layers only"):
        refuse_inexpressible(SECTIONS["gpt2"], int8=True)
    refuse_inexpressible(SECTIONS["llama"], int8=True)


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    experts = ModelSection(**SIZES, experts={"num_experts": 2})
    with pytest.raises(UsageError, match="experts"):
        save_model_folder(build_model(experts, ONE), tmp_path, int8=True)


@pytest.mark.parametrize("kind", ["llama", "llama untied", "bert", "megatron untied", "t5"])
def test_transformers_computes_the_same(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    save_model_folder(make(kind), tmp_path, int8=True)
    mine, _ = load_model_folder(tmp_path, ONE)
    name = json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    theirs, info = getattr(transformers, name).from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    unused = {"cls.predictions.bias"} if kind.startswith("megatron") else set()  # of an untied BERT, a second bias
    assert set(info["missing_keys"]) <= unused and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.tensor(IDS) % mine.vocab_size
    with torch.no_grad():
        batch = {"input_ids": ids, **({"decoder_input_ids": ids} if kind == "t5" else {})}
        out = theirs.eval()(**batch)
        logits = out.prediction_logits if hasattr(out, "prediction_logits") else out.logits
        mine.eval()
        ours = mine(ids, ids) if kind == "t5" else mine(ids)
        torch.testing.assert_close(mine.gather_logits(ours), logits, rtol=1e-4, atol=1e-4)


def test_transformers_reads_a_task_of_its_own_on_it(tmp_path: Path) -> None:
    """A head that the folder lacks stays plain."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    save_model_folder(make("bert"), tmp_path, int8=True)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert theirs.classifier.weight.dtype == torch.float32 and theirs.bert.pooler.dense.weight.dtype == torch.float32
    assert theirs(torch.tensor(IDS) % 100).logits.isfinite().all()


def test_in_slices(run_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    folders = {kind: tmp_path / kind for kind in ("gpt2", "llama", "bert", "t5")}
    for kind, folder in folders.items():
        save_model_folder(make(kind), folder, int8=True)
    found = run_ranks(read, 2, [str(folder) for folder in folders.values()], IDS)
    for kind, folder in folders.items():
        whole, _ = load_model_folder(folder, ONE)
        wanted = {name: module.weight for name, module in layers_of(whole).items()}
        for answer in (found[rank][f"{folder} {keep}"] for rank in range(2) for keep in (False, True)):
            matrices, logits = answer
            assert matrices.keys() == wanted.keys()
            assert all(torch.from_numpy(matrices[name]).equal(wanted[name]) for name in wanted)
            if kind in ("gpt2", "llama"):
                with torch.no_grad():
                    expected = whole.eval().gather_logits(whole(torch.tensor(IDS)))
                torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-5, atol=1e-5)


QUERY = "model.layers.1.self_attn.q_proj.weight"


def spoil(state: dict[str, torch.Tensor], name: str, value: torch.Tensor | None) -> None:
    state.pop(name) if value is None else state.update({name: value})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (f"{QUERY}_scale", None, [f"{QUERY}_scale is missing"]),
        (f"{QUERY}_scale", torch.ones(32), [f"{QUERY}_scale", "[32]", "[32, 1]"]),
        (f"{QUERY}_scale", torch.ones(8, 1), [f"{QUERY}_scale", "[8, 1]", "[32, 1]"]),
        (f"{QUERY}_scale", torch.ones(32, 1, dtype=torch.int32), [f"{QUERY}_scale", "I32"]),
        (f"{QUERY}_scale", torch.full((32, 1), float("nan")), [f"{QUERY}_scale", "no number"]),
        (f"{QUERY}_scale", torch.full((32, 1), -1.0), [f"{QUERY}_scale", "negative"]),
        (QUERY, torch.zeros(32, 16, dtype=torch.int8), [QUERY, "[32, 16]", "[32, 32]"]),
        (QUERY, torch.zeros(32, 32, dtype=torch.int32), [QUERY, "I32"]),
        (QUERY, torch.zeros(32, 32), [f"unexpected tensor {QUERY}_scale"]),
        (f"{QUERY}_zero_point", torch.zeros(32, 1, dtype=torch.int8), [f"unexpected tensor {QUERY}_zero_point"]),
        ("model.norm.weight", torch.zeros(32, dtype=torch.int8), ["model.norm.weight", "I8"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("keep", [False, True])
def test_damage_is_told(name: str, value: Any, words: list[str], keep: bool, tmp_path: Path) -> None:
    save_model_folder(make("llama"), tmp_path, int8=True)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    spoil(state, name, value)
    save_file(state, path)
    with pytest.raises(CheckpointError) as caught:
        load_model_folder(tmp_path, ONE, keep_int8=keep)
    assert str(path) in caught.value.message and all(word in caught.value.message for word in words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_method": "gptq"}, "quant_method: gptq"),
        ({"format": "pack-quantized"}, "format: pack-quantized"),
        ({"weights": {"num_bits": 4}}, "weights.num_bits: 4"),
        ({"weights": {"symmetric": False}}, "weights.symmetric: False"),
        ({"weights": {"strategy": "group", "group_size": 128}}, "weights.strategy: group"),
        ({"input_activations": {"num_bits": 8, "dynamic": True}}, "input_activations"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
        ({"quantization_status": "frozen"}, "quantization_status: frozen"),
        ({"config_groups": {}}, "config_groups"),
        ({"config_groups": {"a": 1}}, "config_groups.a: 1"),
    ],
    ids=str,
)
def test_other_kinds_are_refused_by_name(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    save_model_folder(make("llama"), tmp_path, int8=True)
    config = json.loads((tmp_path / "config.json").read_text())
    entry = config["quantization_config"]
    group = entry["config_groups"]["group_0"]
    for key, value in changes.items():
        if key == "weights":
            group["weights"] |= value
        elif key == "format":
            entry["format"] = group["format"] = value
        else:
            (group if key in group else entry)[key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="not read") as caught:
        read_model_config(tmp_path)
    assert words in caught.value.message and caught.value.hint


def test_files_of_others(tmp_path: Path) -> None:
    """A scale of another type, a matrix that is plain, an output layer that is int8, defaults left out."""
    untied = make("llama untied")
    save_model_folder(untied, tmp_path, int8=True)
    wanted = layers_of(load_model_folder(tmp_path, ONE)[0])
    config = json.loads((tmp_path / "config.json").read_text())
    entry = config["quantization_config"]
    entry |= {"format": "naive-quantized", "sparsity_config": {"format": "dense"}, "ignore": None}
    entry["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": {"strategy": "channel"}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = load_file(tmp_path / "model.safetensors")
    codes, scales = state[QUERY], state.pop(f"{QUERY}_scale")
    state[QUERY] = codes.float() * scales
    down = "model.layers.0.mlp.down_proj.weight_scale"
    state[down] = state[down].bfloat16().float().bfloat16()
    head, head_scales = quantize_rows(state["lm_head.weight"])
    state |= {"lm_head.weight": head, "lm_head.weight_scale": head_scales[:, None].contiguous()}
    save_file(state, tmp_path / "model.safetensors")
    for keep in (False, True):
        model, _ = load_model_folder(tmp_path, ONE, keep_int8=keep)
        for name, layer in layers_of(model).items():
            close = 2**-8 if name == "layers.0.mlp.down" else 0
            torch.testing.assert_close(layer.matrix(torch.float32), wanted[name].weight, rtol=close, atol=0)
            assert (layer.weight.dtype == torch.int8) == (keep and name != "layers.1.attention.qkv")
        assert model.output_weight[: len(head)].equal(dequantize_rows(head, head_scales, torch.float32))
    save_model_folder(model, tmp_path / "again")
    mixed = load_file(tmp_path / "again" / "model.safetensors")
    assert mixed[QUERY].dtype == torch.float32 and mixed[down].dtype == torch.bfloat16
    ignored = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["ignore"]
    assert any("layers\\.1\\.self_attn\\.q_proj" in name for name in ignored)
