"""Exact parameter counts and the arithmetic of a training step, from the model section alone; imports no torch."""

from __future__ import annotations

from mlm_cli.config.schema import ModelSection
from mlm_cli.config.shapes import attended_keys, ffn_hidden_size, head_dim, hub_layout, num_query_groups, padded_vocab_size

__all__ = ["FLOPS_FORMULA", "count_parameters", "flops_per_token", "hub_layout", "parameter_parts"]

FLOPS_FORMULA = "Narayanan et al. 2021, eq. 3, without recomputation"


def _layer_parts(model: ModelSection) -> dict[str, int]:
    """Parameters of one transformer layer by part."""
    h, f, bias = model.hidden_size, ffn_hidden_size(model), int(model.bias)
    query = model.num_attention_heads * head_dim(model)
    qkv = query + 2 * num_query_groups(model) * head_dim(model)
    up = 2 * f if model.activation == "swiglu" else f
    norm = 2 * h if model.norm == "layernorm" else h
    return {
        "norm": 2 * norm,
        "attention": (h + bias) * qkv + (query + bias) * h,
        "mlp": (h + bias) * up + (f + bias) * h,
    }


def parameter_parts(model: ModelSection) -> dict[str, int]:
    """Parameters by part: embedding, attention, mlp, norm, head. The vocabulary counts with its padding."""
    layer = _layer_parts(model)
    vocabulary = padded_vocab_size(model) * model.hidden_size
    positions = model.seq_length * model.hidden_size if model.position == "learned" else 0
    return {
        "embedding": vocabulary + positions,
        "attention": model.num_layers * layer["attention"],
        "mlp": model.num_layers * layer["mlp"],
        "norm": model.num_layers * layer["norm"] + layer["norm"] // 2,
        "head": 0 if model.tie_embeddings else vocabulary,
    }


def count_parameters(model: ModelSection) -> int:
    """Parameters of the whole model, the padding of the vocabulary included; ``vocab_size`` must be set."""
    return sum(parameter_parts(model).values())


def flops_per_token(model: ModelSection, seq_length: int | None = None) -> float:
    """Floating-point operations per trained token: forward and backward of the matrix products.

    Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", eq. 3,
    without its recomputed forward (72 B s l h^2 (1 + s / 6h + V / 12lh) where it has 96 and 16), written out so that
    grouped heads and gated feed-forward layers count as what they are. Attention counts in full, not its causal half;
    where it is sparse, by the keys of its pattern.
    """
    h, f, s = model.hidden_size, ffn_hidden_size(model), seq_length or model.seq_length
    query = model.num_attention_heads * head_dim(model)
    weights = h * (query + 2 * num_query_groups(model) * head_dim(model)) + query * h
    weights += h * f * (3 if model.activation == "swiglu" else 2)
    attention = 2 * attended_keys(model, s) * query  # scores and their product with the values
    return 6.0 * (model.num_layers * (weights + attention) + padded_vocab_size(model) * h)
