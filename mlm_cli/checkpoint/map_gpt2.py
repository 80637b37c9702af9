"""GPT-2 style models as transformers' ``GPT2LMHeadModel`` and back; its linear layers (Conv1D) are transposed."""

from __future__ import annotations

import re
from typing import Any

from mlm_cli.checkpoint.key_map import ConfigReader, Entry, KeyMap
from mlm_cli.config.schema import ModelSection
from mlm_cli.config.shapes import ffn_hidden_size

MODEL_TYPE = "gpt2"
_ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_erf"}
# transformers takes these too, and before its own where both are there.
_OTHER_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
# Heads of pretraining and of tasks: what a model without its head leaves to the task.
HEADS = re.compile(r"(lm_head|score)\.weight|(classifier|qa_outputs)\.(weight|bias)")
TASK_HEADS = {
    "ForSequenceClassification": {"output.weight": "score.weight"},
    "ForTokenClassification": {f"output.{part}": f"classifier.{part}" for part in ("weight", "bias")},
    "ForQuestionAnswering": {f"output.{part}": f"qa_outputs.{part}" for part in ("weight", "bias")},
    "Model": {},
}


def architecture(model: ModelSection) -> str:
    """transformers' class for a model of this layout."""
    return "GPT2LMHeadModel"


def read_config(config: ConfigReader) -> ModelSection:
    """The model section of a GPT-2 ``config.json``."""
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        config.refuse_unless(key, lambda value: not value, "the model would compute something else")
    config.refuse_unless("scale_attn_weights", bool, "scores are always scaled by 1/sqrt(head size)")
    config.refuse_unless("activation_function", _ACTIVATIONS.__contains__, f"known are {', '.join(_ACTIVATIONS)}")
    for other, key in _OTHER_NAMES.items():
        config.refuse_unless(other, lambda value, key=key: value == config.values.get(key, value), f"`{key}` differs")
    own = config.get("mlm", dict, {})
    return config.section(
        num_layers=config.get("n_layer", int),
        hidden_size=config.get("n_embd", int),
        num_attention_heads=config.get("n_head", int),
        ffn_hidden_size=config.get("n_inner", int, 4 * config.get("n_embd", int)),
        seq_length=config.get("n_positions", int, 1024),
        vocab_size=config.get("vocab_size", int),
        position="learned",
        norm="layernorm",
        norm_eps=config.get("layer_norm_epsilon", (int, float), 1e-5),
        activation=_ACTIVATIONS[config.get("activation_function", str, "gelu_new")],
        bias=own.get("bias", True) is not False,
        tie_embeddings=config.get("tie_word_embeddings", bool, True),
        hidden_dropout=config.get("resid_pdrop", (int, float), 0.1),
        attention_dropout=config.get("attn_pdrop", (int, float), 0.1),
    )


def write_config(model: ModelSection) -> dict[str, Any]:
    """``config.json`` entries of a model section that ``hub_layout`` found to be GPT-2's."""
    return {
        "model_type": MODEL_TYPE,
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_head": model.num_attention_heads,
        "n_inner": ffn_hidden_size(model),
        "n_positions": model.seq_length,
        "vocab_size": model.vocab_size,
        "layer_norm_epsilon": model.norm_eps,
        "activation_function": "gelu_new" if model.activation == "gelu" else "gelu",
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "embd_pdrop": model.hidden_dropout,
        "resid_pdrop": model.hidden_dropout,
        "attn_pdrop": model.attention_dropout,
    }


def key_map(model: ModelSection, config: ConfigReader | None = None) -> KeyMap:
    """Parameter names. GPT-2 always has biases: a model without them has zeros there."""
    h, f = model.hidden_size, ffn_hidden_size(model)
    entries = {
        "embedding.word.weight": Entry(("transformer.wte.weight",)),
        "embedding.position.weight": Entry(("transformer.wpe.weight",)),
        "final_norm.weight": Entry(("transformer.ln_f.weight",)),
        "final_norm.bias": Entry(("transformer.ln_f.bias",)),
    }
    zeros: dict[str, tuple[int, ...]] = {}
    linear = {
        "attention.qkv": ("attn.c_attn", 3 * h),
        "attention.out": ("attn.c_proj", h),
        "mlp.up": ("mlp.c_fc", f),
        "mlp.down": ("mlp.c_proj", h),
    }
    for i in range(model.num_layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        for our_norm, their_norm in (("norm1", "ln_1"), ("norm2", "ln_2")):
            for part in ("weight", "bias"):
                entries[f"{ours}.{our_norm}.{part}"] = Entry((f"{theirs}.{their_norm}.{part}",))
        for our_linear, (their_linear, width) in linear.items():
            entries[f"{ours}.{our_linear}.weight"] = Entry((f"{theirs}.{their_linear}.weight",), transposed=True)
            if model.bias:
                entries[f"{ours}.{our_linear}.bias"] = Entry((f"{theirs}.{their_linear}.bias",))
            else:
                zeros[f"{theirs}.{their_linear}.bias"] = (width,)
    copies: dict[str, str] = {}
    if model.tie_embeddings:
        copies["lm_head.weight"] = "transformer.wte.weight"
    else:
        entries["head.weight"] = Entry(("lm_head.weight",))
    ignored = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")
    return KeyMap(entries, "transformer.", zeros, copies=copies, ignored=ignored)
