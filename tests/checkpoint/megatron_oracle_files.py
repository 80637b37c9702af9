"""Megatron-LM's classic layout from its published description, sharing no code with `mlm_cli`.

``write`` lays out the weights of a `transformers` model as Megatron-LM's ranks would have saved them; ``logits``
computes what Megatron-LM computes from such files, rank by rank and stage by stage. Written after the shapes in the
comments of NVIDIA/Megatron-LM's ``megatron/checkpointing.py`` (``_transpose_first_dim``) and
``megatron/model/transformer.py`` (``ParallelAttention.forward``, ``ParallelMLP.forward``), one head at a time.
"""

from __future__ import annotations

import enum
import random
import sys
import types
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.checkpoint import megatron_bert_oracle

_ENUMS = types.ModuleType("megatron.core.enums")
ModelType = enum.Enum("ModelType", {"encoder_or_decoder": 1}, module="megatron.core.enums")  # type: ignore[misc]
_ENUMS.ModelType = ModelType  # type: ignore[attr-defined]


@contextmanager
def installed() -> Iterator[None]:
    """Megatron-LM can be imported, as where its checkpoints are written; elsewhere it cannot."""
    package, core = types.ModuleType("megatron"), types.ModuleType("megatron.core")
    sys.modules.update({"megatron": package, "megatron.core": core, "megatron.core.enums": _ENUMS})
    try:
        yield
    finally:
        for name in ("megatron", "megatron.core", "megatron.core.enums"):
            del sys.modules[name]


def load(path: Path) -> dict[str, Any]:
    with installed():
        return torch.load(path, weights_only=False)


def save(state: Any, path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with installed():
        torch.save(state, path, **options)


def query_key_value(query: Tensor, key: Tensor, value: Tensor, heads: int, groups: int, version: float) -> Tensor:
    """Rows of one rank, from ``query [np * hn, ...]``, ``key``, ``value [ng * hn, ...]``, head by head."""
    q, k, v = query.chunk(heads), key.chunk(groups), value.chunk(groups)
    if version >= 2.0:  # [ng, np/ng queries | key | value, hn]
        each = heads // groups
        return torch.cat([row for g in range(groups) for row in (*q[g * each : (g + 1) * each], k[g], v[g])])
    assert heads == groups
    if version == 1.0:  # [np, hn, 3]
        size = len(q[0])
        return torch.stack([part[n][d] for n in range(heads) for d in range(size) for part in (q, k, v)])
    return torch.cat([*q, *k, *v])  # version 0: [3, np, hn]


def facts(model: Any) -> dict[str, Any]:
    """Sizes of a `transformers` model, and its weights under neutral names; linear weights are [out, in]."""
    config, state = model.config, {name: value.detach() for name, value in model.state_dict().items()}
    if config.model_type == "megatron-bert":
        return megatron_bert_oracle.facts(model)
    if config.model_type == "gpt2":
        layers = []
        for i in range(config.n_layer):
            p = f"transformer.h.{i}."
            qkv_w, qkv_b = state[p + "attn.c_attn.weight"].t().chunk(3), state[p + "attn.c_attn.bias"].chunk(3)
            layers.append({
                "ln1": (state[p + "ln_1.weight"], state[p + "ln_1.bias"]),
                "ln2": (state[p + "ln_2.weight"], state[p + "ln_2.bias"]),
                "q": (qkv_w[0], qkv_b[0]), "k": (qkv_w[1], qkv_b[1]), "v": (qkv_w[2], qkv_b[2]),
                "o": (state[p + "attn.c_proj.weight"].t(), state[p + "attn.c_proj.bias"]),
                "up": [(state[p + "mlp.c_fc.weight"].t(), state[p + "mlp.c_fc.bias"])],
                "down": (state[p + "mlp.c_proj.weight"].t(), state[p + "mlp.c_proj.bias"]),
            })  # fmt: skip
        return {
            "words": state["transformer.wte.weight"], "positions": state["transformer.wpe.weight"], "layers": layers,
            "final": (state["transformer.ln_f.weight"], state["transformer.ln_f.bias"]),
            "head": None if config.tie_word_embeddings else state["lm_head.weight"],
            "heads": config.n_head, "groups": config.n_head, "ffn": config.n_inner or 4 * config.n_embd,
            "length": config.n_positions, "eps": config.layer_norm_epsilon, "size": config.n_embd // config.n_head,
        }  # fmt: skip
    pair = lambda name: (state[name + ".weight"], state.get(name + ".bias"))  # noqa: E731
    layers = []
    for i in range(config.num_hidden_layers):
        p = f"model.layers.{i}."
        layers.append({
            "ln1": pair(p + "input_layernorm"), "ln2": pair(p + "post_attention_layernorm"),
            "q": pair(p + "self_attn.q_proj"), "k": pair(p + "self_attn.k_proj"), "v": pair(p + "self_attn.v_proj"),
            "o": pair(p + "self_attn.o_proj"), "up": [pair(p + "mlp.gate_proj"), pair(p + "mlp.up_proj")],
            "down": pair(p + "mlp.down_proj"),
        })  # fmt: skip
    return {
        "words": state["model.embed_tokens.weight"], "positions": None, "layers": layers,
        "final": pair("model.norm"), "head": None if config.tie_word_embeddings else state["lm_head.weight"],
        "heads": config.num_attention_heads, "groups": config.num_key_value_heads, "ffn": config.intermediate_size,
        "length": config.max_position_embeddings, "eps": config.rms_norm_eps, "size": config.head_dim,
    }  # fmt: skip


def write(
    model: Any,
    folder: Path,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    version: float = 3.0,
    names: str = "new",
    iteration: int | None = 123,
    virtual: int = 1,
    args: bool = True,
    divisible_by: int = 4,
    legacy_file: bool = False,
    **changes: Any,
) -> Path:
    """Save ``model`` as Megatron-LM would have. Returns the folder of the iteration; ``changes`` are put into the args.

    ``names``: "new" (final_norm), "classic" (final_layernorm) or "old" (transformer, attention).
    """
    about = facts(model)
    where = folder / ("release" if iteration is None else f"iter_{iteration:07d}")
    step = divisible_by * tensor
    padded = -(-len(about["words"]) // step) * step
    biased = about["layers"][0]["o"][1] is not None
    namespace = _args(about, model, tensor, pipeline, virtual, padded, divisible_by, biased, version)
    vars(namespace).update(changes)
    per_part = len(about["layers"]) // (pipeline * virtual)
    for stage in range(pipeline):
        for rank in range(tensor):
            state: dict[str, Any] = {"iteration": iteration or 0, "rng_state": [_random_states()]}
            if version > 0:
                state["checkpoint_version"] = version
            if args:
                state["args"] = namespace
            state["optimizer"] = {"state": {0: {"exp_avg": torch.ones(7)}}, "param_groups": [{"lr": 0.1}]}
            for part in range(virtual):
                first = (part * pipeline + stage) * per_part
                begins, ends = stage == part == 0, stage == pipeline - 1 and part == virtual - 1
                key = "model" if virtual == 1 else f"model{part}"
                state[key] = _part(
                    about, rank, tensor, range(first, first + per_part), padded, version, names, begins, ends
                )
            path = where / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline > 1 else "")) / "model_optim_rng.pt"
            save(state, path, _use_new_zipfile_serialization=not legacy_file)
    (folder / "latest_checkpointed_iteration.txt").write_text("release" if iteration is None else str(iteration))
    return where


def _part(
    about: dict[str, Any],
    rank: int,
    tensor: int,
    layers: range,
    padded: int,
    version: float,
    names: str,
    begins: bool,
    ends: bool,
) -> dict[str, Any]:
    """`state_dict_for_save_checkpoint` of one part of one rank."""
    norm = {"new": "norm", "classic": "layernorm", "old": "layernorm"}[names]
    attention = "attention" if names == "old" else "self_attention"

    def rows(full: Tensor) -> Tensor:  # ColumnParallelLinear: rows are cut
        return full.chunk(tensor)[rank].clone()

    def words(full: Tensor) -> Tensor:  # VocabParallelEmbedding; padding rows are trained along and hold anything
        extra = torch.full((padded - len(full), full.shape[1]), 77.0)
        return rows(torch.cat([full, extra]))

    heads, groups = about["heads"] // tensor, about["groups"] // tensor
    flat: OrderedDict[str, Tensor] = OrderedDict()

    def put(name: str, weight: Tensor | None, bias: Tensor | None) -> None:
        for kind, value in (("weight", weight), ("bias", bias)):
            if value is not None:
                flat[f"{name}.{kind}"] = value.clone()

    for local, number in enumerate(layers):
        layer, p = about["layers"][number], f"layers.{local}."
        put(p + f"input_{norm}", *layer["ln1"])
        mine = [[rows(layer[kind][j]) if layer[kind][j] is not None else None for kind in "qkv"] for j in (0, 1)]
        weight = query_key_value(*mine[0], heads, groups, version)  # type: ignore[arg-type]
        bias = None if mine[1][0] is None else query_key_value(*mine[1], heads, groups, version)  # type: ignore[arg-type]
        put(p + f"{attention}.query_key_value", weight, bias)
        put(p + f"{attention}.dense", layer["o"][0].chunk(tensor, 1)[rank], layer["o"][1])  # RowParallelLinear
        put(p + f"post_attention_{norm}", *layer["ln2"])
        up = [None if layer["up"][0][j] is None else torch.cat([rows(half[j]) for half in layer["up"]]) for j in (0, 1)]
        put(p + "mlp.dense_h_to_4h", *up)
        put(p + "mlp.dense_4h_to_h", layer["down"][0].chunk(tensor, 1)[rank], layer["down"][1])
    if ends:
        put(f"final_{norm}", *about["final"])
    language_model: dict[str, Any] = {("transformer" if names == "old" else "encoder"): flat}
    found: dict[str, Any] = {"language_model": language_model}
    if begins:
        embedding = {"word_embeddings": {"weight": words(about["words"])}}
        if about["positions"] is not None:
            embedding["position_embeddings"] = {"weight": about["positions"].clone()}
        if about.get("types") is not None:
            embedding["tokentype_embeddings"] = {"weight": about["types"].clone()}
        language_model["embedding"] = embedding
    if ends and "transform" in about:
        padding = torch.full((padded - len(about["words"]),), -55.0)
        megatron_bert_oracle.put_heads(found, about, rows(torch.cat([about["bias"], padding])), norm)
    if ends and about["head"] is not None:
        language_model["output_layer"] = OrderedDict(weight=words(about["head"]), _extra_state=None)
    if ends and not begins and about["head"] is None:
        found["word_embeddings_for_head"] = {"weight": words(about["words"])}
    return found


def _args(
    about: dict[str, Any],
    model: Any,
    tensor: int,
    pipeline: int,
    virtual: int,
    padded: int,
    divisible_by: int,
    biased: bool,
    version: float,
) -> Namespace:
    """The command line as Megatron pickles it, with an enumeration of its own module in it."""
    rotary = about["positions"] is None
    values: dict[str, Any] = {
        "num_layers": len(about["layers"]), "hidden_size": about["words"].shape[1], "ffn_hidden_size": about["ffn"],
        "num_attention_heads": about["heads"], "kv_channels": about["size"],
        "group_query_attention": about["groups"] != about["heads"],
        "num_query_groups": about["groups"] if about["groups"] != about["heads"] else 1,
        "max_position_embeddings": about["length"], "seq_length": about["length"],
        "position_embedding_type": "rope" if rotary else "learned_absolute", "rotary_percent": 1.0,
        "rotary_base": int(model.config.rope_parameters["rope_theta"]) if rotary else 10000,
        "normalization": "RMSNorm" if rotary else "LayerNorm", "norm_epsilon": about["eps"], "swiglu": rotary,
        "add_bias_linear": biased, "untie_embeddings_and_output_weights": about["head"] is not None,
        "bias_gelu_fusion": biased and getattr(model.config, "activation_function", "") == "gelu_new",
        "openai_gelu": getattr(model.config, "hidden_act", "") == "gelu_new", "onnx_safe": None, "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "init_method_std": 0.02, "make_vocab_size_divisible_by": divisible_by, "padded_vocab_size": padded,
        "bert_binary_head": about.get("binary", True) is not None,
        "params_dtype": torch.float32, "model_type": ModelType(1), "lr": 1e-4, "num_experts": None, "rank": 0,
    }  # fmt: skip
    if version < 3:
        values["model_parallel_size"] = tensor
    else:
        values |= {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
        values["virtual_pipeline_model_parallel_size"] = virtual if virtual > 1 else None
    return Namespace(**values)


def _random_states() -> dict[str, Any]:
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.RandomState(1).get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
    }


@torch.no_grad()
def logits(where: Path, tokens: Tensor, types: Tensor | None = None, hidden: Tensor | None = None) -> Any:
    """What Megatron-LM computes from the files of one iteration, ``[b, s, padded vocabulary]``.

    For BERT: ``types [b, s]``, ``hidden [b, 1, s, s]`` (where not to look); its binary logits come beside.
    """
    folders = sorted(where.glob("mp_rank_*"))
    split = [[int(part) for part in path.name.split("_")[2:]] for path in folders]
    tensor, pipeline = 1 + max(s[0] for s in split), 1 + max((s[1] if len(s) > 1 else 0) for s in split)
    states = {
        (s[0], s[1] if len(s) > 1 else 0): load(path / "model_optim_rng.pt")
        for s, path in zip(split, folders, strict=True)
    }
    args, version, x = states[0, 0]["args"], states[0, 0].get("checkpoint_version", 0), torch.zeros(())
    for stage in range(pipeline):
        ranks = [states[rank, stage]["model"] for rank in range(tensor)]
        lm = [rank["language_model"] for rank in ranks]
        if stage == 0:
            x = _embed(lm, tokens, types)
        encoders = [part.get("encoder", part.get("transformer")) for part in lm]
        while any(name.startswith("layers.0.") for name in encoders[0]):
            one = [{name[9:]: value for name, value in enc.items() if name.startswith("layers.0.")} for enc in encoders]
            x = _layer(one, x, args, version, hidden)
            encoders = [_shifted(enc) for enc in encoders]
        if stage == pipeline - 1:
            x = _norm(x, encoders[0], "final", args)
            if args.untie_embeddings_and_output_weights:
                heads = [part["output_layer"]["weight"] for part in lm]
            elif pipeline > 1:
                heads = [rank["word_embeddings_for_head"]["weight"] for rank in ranks]
            else:
                heads = [part["embedding"]["word_embeddings"]["weight"] for part in lm]
            if "lm_head" in ranks[0]:
                return megatron_bert_oracle.heads(x, ranks, heads, args)
            return torch.cat([x @ head.t() for head in heads], -1)
    raise AssertionError


def _shifted(encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the first layer, the others numbered one lower."""
    found = {}
    for name, value in encoder.items():
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            if number != "0":
                found[f"layers.{int(number) - 1}.{rest}"] = value
        else:
            found[name] = value
    return found


def _embed(lm: list[Any], tokens: Tensor, types: Tensor | None) -> Tensor:
    """VocabParallelEmbedding: each rank looks up the rows it has; the sum has all."""
    x: Any = 0
    for rank, part in enumerate(lm):
        weight = part["embedding"]["word_embeddings"]["weight"]
        mine = (tokens >= rank * len(weight)) & (tokens < (rank + 1) * len(weight))
        x = x + F.embedding((tokens - rank * len(weight)).clamp(0, len(weight) - 1), weight) * mine[..., None]
    if "position_embeddings" in lm[0]["embedding"]:
        x = x + lm[0]["embedding"]["position_embeddings"]["weight"][: tokens.shape[1]]
    if types is not None and "tokentype_embeddings" in lm[0]["embedding"]:
        x = x + lm[0]["embedding"]["tokentype_embeddings"]["weight"][types]
    return x


def _norm(x: Tensor, values: dict[str, Tensor], name: str, args: Any) -> Tensor:
    full = f"{name}_layernorm" if f"{name}_layernorm.weight" in values else f"{name}_norm"
    if args.normalization == "RMSNorm":
        scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + args.norm_epsilon)
        return scaled * values[f"{full}.weight"]
    weight, bias = values[f"{full}.weight"], values[f"{full}.bias"]
    return F.layer_norm(x, x.shape[-1:], weight, bias, args.norm_epsilon)


def _linear(x: Tensor, values: dict[str, Tensor], name: str) -> Tensor:
    return F.linear(x, values[f"{name}.weight"], values.get(f"{name}.bias"))


def _layer(ranks: list[dict[str, Tensor]], x: Tensor, args: Any, version: float, hidden: Tensor | None) -> Tensor:
    attention = "self_attention" if "self_attention.dense.weight" in ranks[0] else "attention"
    inner = _norm(x, ranks[0], "input", args)
    parts = [
        _attend(_linear(inner, rank, f"{attention}.query_key_value"), args, len(ranks), version, hidden)
        @ rank[f"{attention}.dense.weight"].t()
        for rank in ranks
    ]
    x = x + sum(parts) + ranks[0].get(f"{attention}.dense.bias", 0)
    inner = _norm(x, ranks[0], "post_attention", args)
    out: Any = 0
    for rank in ranks:
        wide = _linear(inner, rank, "mlp.dense_h_to_4h")
        if args.swiglu:
            gate, up = wide.chunk(2, -1)
            wide = F.silu(gate) * up
        else:
            wide = F.gelu(wide, approximate="tanh" if args.bias_gelu_fusion or args.openai_gelu else "none")
        out = out + wide @ rank["mlp.dense_4h_to_h.weight"].t()
    return x + out + ranks[0].get("mlp.dense_4h_to_h.bias", 0)


def _attend(mixed: Tensor, args: Any, tensor: int, version: float, hidden: Tensor | None = None) -> Tensor:
    """``mixed [b, s, rows of one rank]`` -> context ``[b, s, np * hn]``; ``hidden [b, 1, s, s]``, unset: the future."""
    b, s, _ = mixed.shape
    heads, size = args.num_attention_heads // tensor, args.kv_channels
    groups = (args.num_query_groups if args.group_query_attention else args.num_attention_heads) // tensor
    if version == 0:
        q, k, v = mixed.view(b, s, 3, heads, size).unbind(2)
    elif version == 1:
        q, k, v = mixed.view(b, s, heads, size, 3).unbind(-1)
    else:
        each = heads // groups
        q, k, v = mixed.view(b, s, groups, (each + 2) * size).split([each * size, size, size], 3)
        q = q.reshape(b, s, heads, size)
    if args.position_embedding_type == "rope":
        q, k = (_rotated(t, args.rotary_base) for t in (q, k))
    k, v = (t.repeat_interleave(heads // groups, 2) for t in (k, v))
    scores = torch.einsum("bqnd,bknd->bnqk", q, k) / size**0.5
    hidden = torch.ones(s, s, dtype=torch.bool).triu(1) if hidden is None else hidden
    scores = scores.masked_fill(hidden, -10000.0)
    return torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), v).reshape(b, s, heads * size)


def _rotated(t: Tensor, base: float) -> Tensor:
    """`apply_rotary_pos_emb`: t * cos + rotate_half(t) * sin, with the frequencies written twice side by side."""
    size = t.shape[-1]
    freqs = torch.outer(torch.arange(t.shape[1]).float(), 1.0 / base ** (torch.arange(0, size, 2).float() / size))
    emb = torch.cat([freqs, freqs], -1)[:, None]
    first, second = t.chunk(2, -1)
    return t * emb.cos() + torch.cat([-second, first], -1) * emb.sin()
