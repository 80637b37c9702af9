"""T5, version 1.0 and 1.1, as transformers' ``T5ForConditionalGeneration`` and back."""

from __future__ import annotations

import re
from typing import Any

from mlm_cli.checkpoint.key_map import ConfigReader, Entry, KeyMap
from mlm_cli.config.schema import ModelSection
from mlm_cli.config.shapes import ffn_hidden_size, head_dim, is_gated, num_decoder_layers

MODEL_TYPE = "t5"
HEADS = re.compile(r"lm_head\.weight")
_ACTIVATIONS = {
    "relu": "relu",
    "gated-gelu": "geglu",
    "gated-gelu_new": "geglu",
    "gated-silu": "swiglu",
    "gelu": "gelu_erf",
    "gelu_new": "gelu",
}
_WORDS, _OUTPUT = "shared.weight", "lm_head.weight"


def architecture(model: ModelSection) -> str:
    """transformers' class for a model of this layout."""
    return "T5ForConditionalGeneration"


def read_config(config: ConfigReader) -> ModelSection:
    """The model section of a T5 ``config.json``.

    transformers 5 always writes ``tie_word_embeddings: true``; whether states are scaled for a tied output layer stands
    in ``scale_decoder_outputs``, and an output layer of its own is then one that differs from the words.
    """
    config.refuse_unless("feed_forward_proj", _ACTIVATIONS.__contains__, f"known are {', '.join(_ACTIVATIONS)}")
    form = config.get("feed_forward_proj", str, "relu")
    said, gated = form.removeprefix("gated-"), form.startswith("gated-")
    config.refuse_unless(  # transformers derives it from the other, unless a folder says otherwise
        "dense_act_fn", (said, "gelu_new" if said == "gelu" else said).__contains__, "feed_forward_proj names another"
    )
    config.refuse_unless("is_gated_act", lambda value: bool(value) == gated, "feed_forward_proj says otherwise")
    config.refuse_unless("is_encoder_decoder", bool, "only whole models, with encoder and decoder")
    layers = config.get("num_layers", int)
    tied = config.get("tie_word_embeddings", bool, True)
    dropout = config.get("dropout_rate", (int, float), 0.1)  # of both kinds, there
    return config.section(
        family="t5",
        num_layers=layers,
        num_decoder_layers=config.get("num_decoder_layers", int, layers),
        hidden_size=config.get("d_model", int),
        num_attention_heads=config.get("num_heads", int),
        head_dim=config.get("d_kv", int),
        ffn_hidden_size=config.get("d_ff", int),
        seq_length=config.get("n_positions", int, 512),
        vocab_size=config.get("vocab_size", int),
        position="relative",
        relative_buckets=config.get("relative_attention_num_buckets", int, 32),
        relative_max_distance=config.get("relative_attention_max_distance", int, 128),
        norm="rmsnorm",
        norm_eps=config.get("layer_norm_epsilon", (int, float), 1e-6),
        activation=_ACTIVATIONS[form],
        bias=False,
        tie_embeddings=config.get("scale_decoder_outputs", bool, tied),
        hidden_dropout=dropout,
        attention_dropout=config.get("mlm", dict, {}).get("attention_dropout", dropout),
    )


def write_config(model: ModelSection) -> dict[str, Any]:
    """``config.json`` entries of a model section that ``hub_layout`` found to be T5's."""
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    return {
        "model_type": MODEL_TYPE,
        "is_encoder_decoder": True,
        "num_layers": model.num_layers,
        "num_decoder_layers": num_decoder_layers(model),
        "d_model": model.hidden_size,
        "d_kv": head_dim(model),
        "d_ff": ffn_hidden_size(model),
        "num_heads": model.num_attention_heads,
        "vocab_size": model.vocab_size,
        "n_positions": model.seq_length,  # read by nothing but us: relative positions have no end
        "relative_attention_num_buckets": model.relative_buckets,
        "relative_attention_max_distance": model.relative_max_distance,
        "feed_forward_proj": names[model.activation],
        "layer_norm_epsilon": model.norm_eps,
        "dropout_rate": model.hidden_dropout,
        "tie_word_embeddings": model.tie_embeddings,
    }


def key_map(model: ModelSection, config: ConfigReader | None = None) -> KeyMap:
    """Parameter names; each stack's table lies in its first layer."""
    entries = {
        "embedding.word.weight": Entry((_WORDS,)),
        "encoder_norm.weight": Entry(("encoder.final_layer_norm.weight",)),
        "final_norm.weight": Entry(("decoder.final_layer_norm.weight",)),
    }
    if not model.tie_embeddings:
        entries["head.weight"] = Entry((_OUTPUT,))
    for stack, layers in (("encoder", model.num_layers), ("decoder", num_decoder_layers(model))):
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        entries[f"{stack}_bias.weight"] = Entry((table,))
        for i in range(layers):
            entries |= _layer(model, f"{stack}.{i}", f"{stack}.block.{i}.layer", decodes=stack == "decoder")
    copies = {f"{stack}.embed_tokens.weight": _WORDS for stack in ("encoder", "decoder")}
    if model.tie_embeddings:
        copies[_OUTPUT] = _WORDS
    # transformers saves shared tensors once, under the name that comes first.
    stand_ins = {_WORDS: tuple(copies), _OUTPUT: (_WORDS,)}
    ignored = re.compile(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight")
    return KeyMap(entries, "", copies=copies, stand_ins=stand_ins, ignored=ignored)


def _layer(model: ModelSection, ours: str, theirs: str, *, decodes: bool) -> dict[str, Entry]:
    """One layer: branches 0, 1 (and 2) of theirs."""
    last = 2 if decodes else 1
    up = ("wi_0", "wi_1") if is_gated(model) else ("wi",)
    modules = {
        "norm1": ("0.layer_norm",),
        "attention.qkv": tuple(f"0.SelfAttention.{part}" for part in "qkv"),
        "attention.out": ("0.SelfAttention.o",),
        "norm2": (f"{last}.layer_norm",),
        "mlp.up": tuple(f"{last}.DenseReluDense.{part}" for part in up),
        "mlp.down": (f"{last}.DenseReluDense.wo",),
    }
    if decodes:
        modules |= {
            "norm_cross": ("1.layer_norm",),
            "cross.query": ("1.EncDecAttention.q",),
            "cross.kv": ("1.EncDecAttention.k", "1.EncDecAttention.v"),
            "cross.out": ("1.EncDecAttention.o",),
        }
    return {
        f"{ours}.{name}.weight": Entry(tuple(f"{theirs}.{part}.weight" for part in parts))
        for name, parts in modules.items()
    }
