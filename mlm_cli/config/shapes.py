"""Sizes that follow from a model section: what a key left unset means, and which outside layout can hold the model."""

from __future__ import annotations

from mlm_cli.config.schema import ModelSection
from mlm_cli.errors import UsageError


def head_dim(model: ModelSection) -> int:
    """Width of one attention head."""
    return model.head_dim or model.hidden_size // model.num_attention_heads


def num_query_groups(model: ModelSection) -> int:
    """Key/value heads."""
    return model.num_query_groups or model.num_attention_heads


def ffn_hidden_size(model: ModelSection) -> int:
    """Inner width of the feed-forward layer: 4h, or 8h/3 rounded up to 64 for swiglu (same number of weights)."""
    if model.ffn_hidden_size is not None:
        return model.ffn_hidden_size
    return -(-8 * model.hidden_size // 192) * 64 if model.activation == "swiglu" else 4 * model.hidden_size


def is_sparse(model: ModelSection) -> bool:
    """True where a query of self-attention sees the keys of a pattern only."""
    return model.attention.pattern not in (None, "dense")


def attended_keys(model: ModelSection, seq_length: int) -> float:
    """Keys whose scores a query costs, about; a causal half counts in full, as everywhere in the counts of work."""
    sparse, s = model.attention, seq_length
    stretches = max(1.0, s / sparse.window)
    keys: dict[str | None, float] = {
        "local": sparse.window,
        "longformer": sparse.window + sparse.global_tokens,
        "bigbird": sparse.window + sparse.global_tokens + sparse.random * sparse.block,
        "strided": sparse.window + stretches * sparse.block,
        "fixed": sparse.window + stretches * sparse.global_tokens,
    }
    return min(float(s), keys.get(sparse.pattern, float(s)))


def padded_vocab_size(model: ModelSection) -> int:
    """Rows of the word embedding. Depends on the recipe alone, never on how many ranks there are."""
    assert model.vocab_size is not None, "vocab_size is set from the tokenizer before a model is built"
    step = model.make_vocab_size_divisible_by
    return -(-model.vocab_size // step) * step


def hub_layout(model: ModelSection) -> str:
    """The Hugging Face architecture that holds this model: ``"gpt2"`` or ``"llama"``.

    Raises:
        UsageError: neither can; checkpoints could not be written.
    """
    gpt2 = {
        "position: learned": model.position == "learned",
        "norm: layernorm": model.norm == "layernorm",
        "activation: gelu or gelu_erf": model.activation in ("gelu", "gelu_erf"),
        "num_query_groups: unset": num_query_groups(model) == model.num_attention_heads,
        "head_dim: unset": head_dim(model) * model.num_attention_heads == model.hidden_size,
    }
    llama = {
        "position: rotary": model.position == "rotary",
        "norm: rmsnorm": model.norm == "rmsnorm",
        "activation: swiglu": model.activation == "swiglu",
    }
    for name, rules in (("gpt2", gpt2), ("llama", llama)):
        if all(rules.values()):
            return name
    nearest = "gpt2" if model.position == "learned" else "llama"
    broken = [rule for rule, kept in (gpt2 if nearest == "gpt2" else llama).items() if not kept]
    raise UsageError(
        f"no Hugging Face architecture holds this model: position {model.position}, norm {model.norm}, "
        f"activation {model.activation}, {num_query_groups(model)} query groups",
        hint=f"for the {nearest} layout set model." + " and model.".join(broken),
    )


def check_slices(model: ModelSection, tensor: int) -> None:
    """Refuse a tensor size that does not divide what is sliced (for models that come without a recipe).

    Raises:
        UsageError: naming the first size that ``tensor`` ranks cannot share.
    """
    sizes = {
        "attention heads": model.num_attention_heads,
        "query groups": num_query_groups(model),
        "feed-forward width": ffn_hidden_size(model),
        "padded vocabulary": padded_vocab_size(model),
    }
    for what, size in sizes.items():
        if size % tensor:
            fits = max(t for t in range(1, tensor) if all(s % t == 0 for s in sizes.values()))
            raise UsageError(
                f"this model's {what} ({size}) cannot be sliced over parallel.tensor={tensor} ranks",
                hint=f"use parallel.tensor={fits}",
            )
