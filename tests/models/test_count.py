"""Counts against built models and published numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mlm_cli.config.schema import ModelSection
from mlm_cli.models.count import count_parameters, flops_per_token, parameter_parts
from mlm_cli.models.registry import build_gpt
from mlm_cli.parallel.context import ParallelContext

LLAMA: dict[str, Any] = {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu"}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bias": False, "tie_embeddings": False},
        {"make_vocab_size_divisible_by": 7},
        {**LLAMA, "bias": False},
        {**LLAMA, "num_query_groups": 2, "head_dim": 10, "ffn_hidden_size": 50, "tie_embeddings": False},
    ],
    ids=str,
)
def test_count_equals_the_built_model(settings: dict[str, Any]) -> None:
    model = ModelSection(num_layers=3, hidden_size=24, num_attention_heads=4, seq_length=20, vocab_size=131, **settings)
    built = build_gpt(model, ParallelContext(device=torch.device("meta")), init=False)
    assert count_parameters(model) == sum(param.numel() for param in built.parameters())
    assert count_parameters(model) == sum(parameter_parts(model).values())


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "billions"),
    [(40, 1536, 16, 1.213), (54, 1920, 20, 2.490), (64, 2304, 24, 4.199), (72, 3072, 32, 8.317)],
)
def test_models_of_the_megatron_scaling_study(layers: int, hidden: int, heads: int, billions: float) -> None:
    model = ModelSection(
        num_layers=layers, hidden_size=hidden, num_attention_heads=heads, seq_length=1024, vocab_size=51200
    )
    assert count_parameters(model) / 1e9 == pytest.approx(billions, abs=5e-4)


def test_flops_are_the_published_formula() -> None:
    """72 B s l h^2 (1 + s / 6h + V / 12 l h) for a GPT-2 shape (Narayanan et al. 2021, eq. 3)."""
    model = ModelSection(num_layers=24, hidden_size=1024, num_attention_heads=16, seq_length=2048, vocab_size=51200)
    layers, h, s, v = 24, 1024, 2048, 51200
    published = 72 * layers * h * h * (1 + s / (6 * h) + v / (12 * layers * h))
    assert flops_per_token(model) == pytest.approx(published, rel=1e-12)


def test_flops_are_those_torch_counts() -> None:
    """An outside count of a forward and backward pass, with attention written out."""
    from torch.utils.flop_counter import FlopCounterMode

    model = ModelSection(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        seq_length=32,
        vocab_size=256,
        attention="reference",
        **LLAMA,
    )
    built = build_gpt(model, ParallelContext.single())
    tokens = torch.randint(0, 256, (2, 32))
    with FlopCounterMode(display=False) as counter:
        built.loss({"tokens": tokens, "labels": tokens})[0].backward()
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(flops_per_token(model), rel=1e-9)
