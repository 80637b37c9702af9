"""`optimizer.lr_scaling: initial_std` is AdamW on weights of one size, which the model multiplies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_cases import INITIAL_STD, SCALED, SETTINGS, engine_run, make_model, scaled_reference_run
from torch import nn

from mlm_cli.config.schema import ModelSection
from mlm_cli.models.registry import build_model
from mlm_cli.parallel.context import ParallelContext


def check(weights: dict[str, Any], reference: nn.Module) -> None:
    before = dict(make_model().named_parameters())
    for name, expected in reference.named_parameters():
        found = torch.from_numpy(weights[name])
        moved = (expected - before[name]).abs().max().item()
        assert moved > 0
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4 * moved)


def test_plain_engine() -> None:
    check(engine_run("plain", 2, torch.float32, settings=SCALED)[2], scaled_reference_run(2))


def _on_ranks(rank: int, size: int, zero: int) -> dict[str, Any]:
    return engine_run("deepspeed", 2, torch.float32, ParallelContext.create(), zero, settings=SCALED)[2]


@pytest.mark.parametrize("zero", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_deepspeed(zero: int, run_ranks: Callable[..., list[Any]]) -> None:
    pytest.importorskip("deepspeed")
    for weights in run_ranks(_on_ranks, 2, zero):
        check(weights, scaled_reference_run(2))


def test_what_is_scaled() -> None:
    model = make_model()
    assert {SETTINGS.of(p).lr_scale for p in model.parameters()} == {1.0}
    scales = {name: SCALED.of(p).lr_scale for name, p in model.named_parameters()}
    assert scales["0.weight"] == pytest.approx(25) and scales["3.weight"] == pytest.approx(0.5)
    assert all(scale == 1.0 for name, scale in scales.items() if name not in INITIAL_STD)


def test_t5_scales_its_embedding_and_gpt_nothing_wider_than_itself() -> None:
    sizes: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "seq_length": 16}
    t5 = ModelSection(family="t5", position="relative", norm="rmsnorm", bias=False, vocab_size=64, **sizes)
    scales = {name: SCALED.of(p).lr_scale for name, p in build_model(t5, ParallelContext.single()).named_parameters()}
    assert scales["embedding.word.weight"] == pytest.approx(50)
    assert scales["encoder.0.attention.qkv.weight"] == pytest.approx((32 * 16) ** -0.5 / 0.02)
    gpt = ModelSection(vocab_size=64, **sizes)
    found = [SCALED.of(p).lr_scale for p in build_model(gpt, ParallelContext.single()).parameters()]
    assert max(found) == 1.0 and min(found) == pytest.approx(0.5)
