"""Sizes that follow from a model section: what a key left unset means, and which outside layout can hold the model."""

from __future__ import annotations

from collections.abc import Callable

from mlm_cli.config.schema import ModelSection, RotaryScalingSection
from mlm_cli.errors import UsageError

Rules = Callable[[ModelSection], dict[str, bool]]  # what an outside layout asks of a model section, and is it so


def head_dim(model: ModelSection) -> int:
    """Width of one attention head."""
    return model.head_dim or model.hidden_size // model.num_attention_heads


def attention_scale(model: ModelSection) -> float:
    """Factor on attention scores: ``1 / sqrt(head size)``, which T5 has in its initial weights instead."""
    return 1.0 if model.family == "t5" else head_dim(model) ** -0.5


def decoder_seq_length(model: ModelSection) -> int:
    """Tokens of a T5 target.

    Unset: about what comes of masking 15 % of a text in spans of 3 on average (Raffel et al. 2020, section 3.1.4), the
    defaults of ``data.span_corruption``: each span gives its tokens and a sentinel, and a text of ``r`` tokens leaves
    ``0.9 r + 1``.
    """
    return model.decoder_seq_length or 2 * (model.seq_length - 1) // 9 + 1


def num_decoder_layers(model: ModelSection) -> int:
    """Of T5's decoder."""
    return model.num_decoder_layers or model.num_layers


def sample_tokens(model: ModelSection) -> int:
    """Tokens that a model reads of one training sample."""
    return model.seq_length + (decoder_seq_length(model) if model.family == "t5" else 0)


def num_query_groups(model: ModelSection) -> int:
    """Key/value heads."""
    return model.num_query_groups or model.num_attention_heads


def is_gated(model: ModelSection) -> bool:
    """True where the feed-forward layer multiplies two projections (Shazeer 2020)."""
    return model.activation in ("swiglu", "geglu")


def has_experts(model: ModelSection, layer: int) -> bool:
    """True where layer number ``layer`` (from 0) has a mixture of experts."""
    return model.experts is not None and (layer + 1) % model.experts.every == 0


def ffn_hidden_size(model: ModelSection) -> int:
    """Inner width of the feed-forward layer: 4h, or 8h/3 rounded up to 64 where gated (same number of weights)."""
    if model.ffn_hidden_size is not None:
        return model.ffn_hidden_size
    return -(-8 * model.hidden_size // 192) * 64 if is_gated(model) else 4 * model.hidden_size


def is_sparse(model: ModelSection) -> bool:
    """True where a query of self-attention sees the keys of a pattern only."""
    return model.attention.pattern not in (None, "dense")


_RAMPS = {"yarn": ("beta_fast", "beta_slow"), "llama3": ("high_freq_factor", "low_freq_factor")}


def crossed_ramp(scaling: RotaryScalingSection) -> tuple[str, str] | None:
    """The keys of the two ends of a ramp where the upper one is not above the lower one; None where all is well."""
    fast, slow = _RAMPS.get(scaling.type, ("", ""))
    return (fast, slow) if fast and getattr(scaling, fast) <= getattr(scaling, slow) else None


def written_out(model: ModelSection) -> ModelSection:
    """The same model, its sizes of weights written out where they were left unset."""
    decoder = {"num_decoder_layers": num_decoder_layers(model)} if model.family == "t5" else {}
    return model.model_copy(
        update={
            "head_dim": head_dim(model),
            "num_query_groups": num_query_groups(model),
            "ffn_hidden_size": ffn_hidden_size(model),
            **decoder,
        }
    )


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
    """The Hugging Face architecture that holds this model: its ``model_type``; ``mlm`` for what only we can read.

    Raises:
        UsageError: none can; checkpoints could not be written.
    """
    if model.experts is not None:
        return "mlm"
    rules = _HUB_RULES[model.family]
    broken = {name: [rule for rule, kept in wanted(model).items() if not kept] for name, wanted in rules.items()}
    for name, missed in broken.items():
        if not missed:
            return name
    nearest = min(broken, key=lambda name: len(broken[name]))
    raise UsageError(
        f"no Hugging Face architecture holds this model: family {model.family}, position {model.position}, norm "
        f"{model.norm_order} {model.norm}, activation {model.activation}, {num_query_groups(model)} query groups",
        hint=f"for the {nearest} layout set model." + " and model.".join(broken[nearest]),
    )


def _even_heads(model: ModelSection) -> dict[str, bool]:
    return {
        "num_query_groups: unset": num_query_groups(model) == model.num_attention_heads,
        "head_dim: unset": head_dim(model) * model.num_attention_heads == model.hidden_size,
    }


def _gpt2_rules(model: ModelSection) -> dict[str, bool]:
    return {
        "position: learned": model.position == "learned",
        "norm: layernorm": model.norm == "layernorm",
        "norm_order: pre": model.norm_order == "pre",
        "activation: gelu or gelu_erf": model.activation in ("gelu", "gelu_erf"),
        "num_token_types: 0": model.num_token_types == 0,
        **_even_heads(model),
    }


def _llama_rules(model: ModelSection) -> dict[str, bool]:
    return {
        "position: rotary": model.position == "rotary",
        "norm: rmsnorm": model.norm == "rmsnorm",
        "norm_order: pre": model.norm_order == "pre",
        "activation: swiglu": model.activation == "swiglu",
        "num_token_types: 0": model.num_token_types == 0,
    }


def _bert_rules(order: str) -> Rules:
    def rules(model: ModelSection) -> dict[str, bool]:
        return {
            "position: learned": model.position == "learned",
            "norm: layernorm": model.norm == "layernorm",
            f"norm_order: {order}": model.norm_order == order,
            "activation: gelu or gelu_erf": model.activation in ("gelu", "gelu_erf"),
            "num_token_types: 1 or more": model.num_token_types > 0,
            "bias: true": model.bias,
            **_even_heads(model),
        }

    return rules


def _t5_rules(model: ModelSection) -> dict[str, bool]:
    return {
        "position: relative": model.position == "relative",
        "norm: rmsnorm": model.norm == "rmsnorm",
        "norm_order: pre": model.norm_order == "pre",
        "bias: false": not model.bias,
        "num_query_groups: unset": num_query_groups(model) == model.num_attention_heads,
        "num_token_types: 0": model.num_token_types == 0,
    }


_HUB_RULES: dict[str, dict[str, Rules]] = {
    "gpt": {"gpt2": _gpt2_rules, "llama": _llama_rules},
    "bert": {"bert": _bert_rules("post"), "megatron-bert": _bert_rules("pre")},
    "t5": {"t5": _t5_rules},
}


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
    if model.experts is not None:
        sizes["experts"] = model.experts.num_experts
    for what, size in sizes.items():
        if size % tensor:
            fits = max(t for t in range(1, tensor) if all(s % t == 0 for s in sizes.values()))
            raise UsageError(
                f"this model's {what} ({size}) cannot be sliced over parallel.tensor={tensor} ranks",
                hint=f"use parallel.tensor={fits}",
            )


def turns_by_length(model: ModelSection) -> bool:
    """Do positions turn by the length of the whole text (dynamic rotary scaling), so that padding would change it?"""
    return model.rotary_scaling is not None and model.rotary_scaling.type == "dynamic"
