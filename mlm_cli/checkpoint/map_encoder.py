"""What the two BERT layouts of transformers share: configuration, embeddings, layers and heads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlm_cli.checkpoint.key_map import ConfigReader, Entry, KeyMap
from mlm_cli.config.schema import ModelSection
from mlm_cli.config.shapes import ffn_hidden_size

_ACTIVATIONS = {"gelu": "gelu_erf", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu"}
# transformers keeps buffers here, and a copy of the output layer's bias.
_BUFFERS = r"(bert\.)?embeddings\.position_ids"
# Heads of pretraining and of tasks: what a model without its head leaves to the task.
HEADS = re.compile(r"(bert\.)?pooler\.dense\.(weight|bias)|cls\..+|(classifier|qa_outputs)\.(weight|bias)")
_POOLER = {f"pooler.{part}": f"bert.pooler.dense.{part}" for part in ("weight", "bias")}
_CLASSIFIER = {f"output.{part}": f"classifier.{part}" for part in ("weight", "bias")}
TASK_HEADS = {
    "ForSequenceClassification": {**_POOLER, **_CLASSIFIER},
    "ForTokenClassification": _CLASSIFIER,
    "ForQuestionAnswering": {f"output.{part}": f"qa_outputs.{part}" for part in ("weight", "bias")},
    "ForMultipleChoice": {**_POOLER, **_CLASSIFIER},
    "Model": {},
}


def read_encoder(config: ConfigReader, *, norm_order: str, binary_head: str) -> ModelSection:
    """The model section of a BERT-like ``config.json``.

    Args:
        binary_head: what a pretraining model without our own entry has been taught.
    """
    config.refuse_unless("hidden_act", _ACTIVATIONS.__contains__, f"known are {', '.join(_ACTIVATIONS)}")
    config.refuse_unless("is_decoder", lambda value: not value, "BERT is an encoder here")
    config.refuse_unless("add_cross_attention", lambda value: not value, "BERT is an encoder here")
    config.refuse_unless(
        "position_embedding_type", lambda value: value == "absolute", "positions must be absolute (learned)"
    )
    own = config.get("mlm", dict, {})
    pretraining = any(str(name).endswith("ForPreTraining") for name in config.get("architectures", list, []))
    return config.section(
        family="bert",
        num_layers=config.get("num_hidden_layers", int),
        hidden_size=config.get("hidden_size", int),
        num_attention_heads=config.get("num_attention_heads", int),
        ffn_hidden_size=config.get("intermediate_size", int),
        seq_length=config.get("max_position_embeddings", int, 512),
        vocab_size=config.get("vocab_size", int),
        num_token_types=config.get("type_vocab_size", int, 2),
        binary_head=own.get("binary_head", binary_head) if pretraining else "none",
        position="learned",
        norm="layernorm",
        norm_order=norm_order,
        norm_eps=config.get("layer_norm_eps", (int, float), 1e-12),
        activation=_ACTIVATIONS[config.get("hidden_act", str, "gelu")],
        bias=True,
        tie_embeddings=config.get("tie_word_embeddings", bool, True),
        hidden_dropout=config.get("hidden_dropout_prob", (int, float), 0.1),
        attention_dropout=config.get("attention_probs_dropout_prob", (int, float), 0.1),
    )


def write_encoder(model: ModelSection) -> dict[str, Any]:
    """``config.json`` entries of a model section, but for ``model_type``."""
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": ffn_hidden_size(model),
        "max_position_embeddings": model.seq_length,
        "vocab_size": model.vocab_size,
        "type_vocab_size": model.num_token_types,
        "hidden_act": "gelu" if model.activation == "gelu_erf" else "gelu_new",
        "layer_norm_eps": model.norm_eps,
        "hidden_dropout_prob": model.hidden_dropout,
        "attention_probs_dropout_prob": model.attention_dropout,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
    }


def encoder_map(model: ModelSection, norms: Mapping[str, str], outer: Mapping[str, str]) -> KeyMap:
    """Where the parameters lie. ``norms``, ``outer``: our norm of a layer, or outside all of them -> theirs."""
    entries = _encoder_entries(model, norms)
    for ours, theirs in outer.items():
        entries |= {f"{ours}.{part}": Entry((f"{theirs}.{part}",)) for part in ("weight", "bias")}
    head, copies, ignored = _head_entries(model)
    entries |= head
    return KeyMap(entries, "bert.", copies=copies, ignored=ignored, stand_ins=_old_names(entries))


def _old_names(entries: Mapping[str, Entry]) -> dict[str, tuple[str, ...]]:
    """Norms as the TensorFlow original calls them, and the files of its models (google-bert/bert-base-uncased)."""
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    found = {}
    for name in (source for entry in entries.values() for source in entry.sources):
        for new in old:
            if name.endswith(f".{new}"):
                other = name.removesuffix(new) + old[new]
                found[name] = (other, other.removeprefix("bert."))
    return found


def _encoder_entries(model: ModelSection, norms: Mapping[str, str]) -> dict[str, Entry]:
    """Embeddings and layers. ``norms``: our norm of a layer -> where it lies in theirs."""
    entries = {
        "embedding.word.weight": Entry(("bert.embeddings.word_embeddings.weight",)),
        "embedding.position.weight": Entry(("bert.embeddings.position_embeddings.weight",)),
        "embedding.token_type.weight": Entry(("bert.embeddings.token_type_embeddings.weight",)),
    }
    modules = {
        "attention.qkv": tuple(f"attention.self.{part}" for part in ("query", "key", "value")),
        "attention.out": ("attention.output.dense",),
        "mlp.up": ("intermediate.dense",),
        "mlp.down": ("output.dense",),
        **{ours: (theirs,) for ours, theirs in norms.items()},
    }
    for i in range(model.num_layers):
        for ours, theirs in modules.items():
            for part in ("weight", "bias"):
                sources = tuple(f"bert.encoder.layer.{i}.{module}.{part}" for module in theirs)
                entries[f"layers.{i}.{ours}.{part}"] = Entry(sources)
    return entries


def _head_entries(model: ModelSection) -> tuple[dict[str, Entry], dict[str, str], re.Pattern[str]]:
    """The heads of pretraining, the copies that their folders hold, and what else there carries nothing."""
    predictions = "cls.predictions"
    # Tied, the layer's own bias is what transformers stores; untied, only that of `decoder` is used.
    bias, other = (f"{predictions}.bias", f"{predictions}.decoder.bias")
    if not model.tie_embeddings:
        bias, other = other, bias
    entries = {"head.bias": Entry((bias,))}
    copies: dict[str, str] = {}
    ignored = _BUFFERS
    for part in ("weight", "bias"):
        entries[f"head.transform.{part}"] = Entry((f"{predictions}.transform.dense.{part}",))
        entries[f"head.norm.{part}"] = Entry((f"{predictions}.transform.LayerNorm.{part}",))
        if model.binary_head == "none":  # the models of the original say BertForMaskedLM and hold the other head too
            ignored += rf"|(bert\.)?pooler\.dense\.{part}|cls\.seq_relationship\.{part}"
        else:
            entries[f"head.pooler.{part}"] = Entry((f"bert.pooler.dense.{part}",))
            entries[f"head.binary.{part}"] = Entry((f"cls.seq_relationship.{part}",))
    if model.tie_embeddings:
        copies = {f"{predictions}.decoder.weight": "bert.embeddings.word_embeddings.weight", other: bias}
    else:
        entries["head.weight"] = Entry((f"{predictions}.decoder.weight",))
        ignored += f"|{re.escape(other)}"
    return entries, copies, re.compile(ignored)
