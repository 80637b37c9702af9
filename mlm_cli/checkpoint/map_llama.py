"""Llama style models as transformers' ``LlamaForCausalLM`` and back."""

from __future__ import annotations

import re
from typing import Any

from mlm_cli.checkpoint.key_map import ConfigReader, Entry, KeyMap
from mlm_cli.checkpoint.rope_parameters import read_rope, write_rope
from mlm_cli.config.schema import ModelSection
from mlm_cli.config.shapes import ffn_hidden_size, head_dim, num_query_groups

MODEL_TYPE = "llama"
# Heads of pretraining and of tasks: what a model without its head leaves to the task.
HEADS = re.compile(r"lm_head\.weight|(score|qa_outputs)\.(weight|bias)")
TASK_HEADS = {
    "ForSequenceClassification": {"output.weight": "score.weight"},
    "ForTokenClassification": {f"output.{part}": f"score.{part}" for part in ("weight", "bias")},
    "ForQuestionAnswering": {f"output.{part}": f"qa_outputs.{part}" for part in ("weight", "bias")},
    "Model": {},
}
# transformers names the bare model so in this one class.
TASK_PREFIX = {"ForQuestionAnswering": "transformer."}


def architecture(model: ModelSection) -> str:
    """transformers' class for a model of this layout."""
    return "LlamaForCausalLM"


def read_config(config: ConfigReader) -> ModelSection:
    """The model section of a Llama ``config.json``."""
    config.refuse_unless("hidden_act", lambda value: value in ("silu", "swish"), "the activation must be silu")
    hidden, heads = config.get("hidden_size", int), config.get("num_attention_heads", int)
    return config.section(
        num_layers=config.get("num_hidden_layers", int),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads", int, heads),
        head_dim=config.get("head_dim", int, hidden // max(heads, 1)),
        ffn_hidden_size=config.get("intermediate_size", int),
        vocab_size=config.get("vocab_size", int),
        position="rotary",
        **read_rope(config),
        norm="rmsnorm",
        norm_eps=config.get("rms_norm_eps", (int, float), 1e-6),
        activation="swiglu",
        bias=config.get("attention_bias", bool, False) or config.get("mlp_bias", bool, False),
        tie_embeddings=config.get("tie_word_embeddings", bool, False),
        attention_dropout=config.get("attention_dropout", (int, float), 0.0),
    )


def write_config(model: ModelSection) -> dict[str, Any]:
    """``config.json`` entries of a model section that ``hub_layout`` found to be Llama's."""
    return {
        "model_type": MODEL_TYPE,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": num_query_groups(model),
        "head_dim": head_dim(model),
        "intermediate_size": ffn_hidden_size(model),
        "vocab_size": model.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        **write_rope(model),
        "attention_bias": model.bias,
        "mlp_bias": model.bias,
        "attention_dropout": model.attention_dropout,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
    }


def key_map(model: ModelSection, config: ConfigReader | None = None) -> KeyMap:
    """Parameter names. Where only attention or only the feed-forward layer has biases, the others count as zeros."""
    entries = {
        "embedding.word.weight": Entry(("model.embed_tokens.weight",)),
        "final_norm.weight": Entry(("model.norm.weight",)),
    }
    absent: set[str] = set()
    linear = {
        "attention.qkv": ("self_attn", ("q_proj", "k_proj", "v_proj"), "attention_bias"),
        "attention.out": ("self_attn", ("o_proj",), "attention_bias"),
        "mlp.up": ("mlp", ("gate_proj", "up_proj"), "mlp_bias"),
        "mlp.down": ("mlp", ("down_proj",), "mlp_bias"),
    }
    for i in range(model.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        entries[f"{ours}.norm1.weight"] = Entry((f"{theirs}.input_layernorm.weight",))
        entries[f"{ours}.norm2.weight"] = Entry((f"{theirs}.post_attention_layernorm.weight",))
        for name, (module, parts, bias_key) in linear.items():
            for kind in ("weight", "bias") if model.bias else ("weight",):
                sources = tuple(f"{theirs}.{module}.{part}.{kind}" for part in parts)
                entries[f"{ours}.{name}.{kind}"] = Entry(sources)
                if kind == "bias" and config is not None and not config.get(bias_key, bool, False):
                    absent.update(sources)
    copies: dict[str, str] = {}
    if model.tie_embeddings:
        copies["lm_head.weight"] = "model.embed_tokens.weight"
    else:
        entries["head.weight"] = Entry(("lm_head.weight",))
    ignored = re.compile(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
    return KeyMap(entries, "model.", absent=frozenset(absent), copies=copies, ignored=ignored)
