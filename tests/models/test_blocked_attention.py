"""Blocked attention against the written-out definition, forward and backward, over several blocks of queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mlm_cli import ops
from mlm_cli.config.schema import ModelSection
from mlm_cli.models import blocked_attention
from mlm_cli.models.attention import attend_reference
from mlm_cli.models.info import SequenceInfo, document_mask
from mlm_cli.models.registry import build_model
from mlm_cli.models.rotary import RotaryTable, rotate
from mlm_cli.parallel.context import ParallelContext


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("length", [50, 16, 1])
def test_equals_the_definition(
    groups: int, rotary: bool, documents: bool, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked_attention, "_QUERIES", 16)
    monkeypatch.setattr(blocked_attention, "_BLOCK_BYTES", 2 * 4 * 16 * length * 4)  # two samples of three
    torch.manual_seed(0)
    packed = torch.randn(3, length, 4 + 2 * groups, 8)
    grad = torch.randn(3, length, 4, 8)
    visible = document_mask(torch.randint(0, 3, (3, length)).sort(1).values) if documents else None
    tables = RotaryTable(8, 100.0).at(torch.arange(length), torch.float32) if rotary else None

    mine = packed.clone().requires_grad_()
    out = blocked_attention.attend_blocked(mine, tables, visible, 4)
    out.backward(grad)

    plain = packed.clone().requires_grad_()
    pair, value = plain.split([4 + groups, groups], 2)
    query, key = (rotate(pair, tables) if tables else pair).split([4, groups], 2)
    expected = attend_reference(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        SequenceInfo(torch.arange(length), visible=visible),
        0.0,
    ).transpose(1, 2)
    expected.backward(grad)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_a_bias_learns(samples: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias of each head and pair, shared by the samples or not, with keys out of sight."""
    monkeypatch.setattr(blocked_attention, "_QUERIES", 16)
    monkeypatch.setattr(blocked_attention, "_BLOCK_BYTES", 2 * 4 * 16 * 50 * 4)
    torch.manual_seed(0)
    hidden = torch.rand(samples, 4, 50, 50) < 0.3
    hidden[..., 0] = False
    bias = torch.randn(samples, 4, 50, 50).masked_fill(hidden, -torch.inf)
    packed, grad = torch.randn(3, 50, 12, 8), torch.randn(3, 50, 4, 8)
    results = []
    for blocked in (True, False):
        qkv, added = packed.clone().requires_grad_(), bias.clone().requires_grad_()
        if blocked:
            out = blocked_attention.attend_blocked(qkv, None, None, 4, bias=added, scale=scale)
        else:
            query, key, value = (part.transpose(1, 2) for part in qkv.split(4, 2))
            info = SequenceInfo(torch.arange(50), bias=added)
            out = attend_reference(query, key, value, info, 0.0, scale).transpose(1, 2)
        out.backward(grad)
        results.append((out, qkv.grad, added.grad))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_rotation_turns_pairs_by_their_angle() -> None:
    """Half-split pairs (i, i + d/2) as complex numbers, multiplied by e^(i * position * base^(-2i/d))."""
    x, positions = torch.randn(2, 7, 3, 10, dtype=torch.float64), torch.tensor([0, 3, 5, 1, 99, 2, 1000])
    angles = positions[:, None].double() * 50.0 ** (-torch.arange(0, 10, 2).double() / 10)
    turned = torch.complex(x[..., :5], x[..., 5:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    found = rotate(x.float(), RotaryTable(10, 50.0).at(positions, torch.float32))
    torch.testing.assert_close(found.double(), torch.cat([turned.real, turned.imag], -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt", "gpt documents", "bert", "bert padded", "t5 padded"])
def test_runs_of_keys_change_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole models in float32 on attention over runs of keys, and on the written-out one: loss and gradients."""
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 200, "seq_length": 80}
    own: dict[str, dict[str, Any]] = {
        "gpt": {"position": "rotary", "num_query_groups": 2},
        "t5": {"decoder_seq_length": 70, "position": "relative"},
    }
    name = family.split()[0]
    draw = torch.Generator().manual_seed(0)

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(0, 200, (3, length), generator=draw)

    batch = {"tokens": tokens(80), "labels": tokens(80), "loss_mask": torch.ones(3, 80)}
    if family == "gpt documents":
        batch["segments"] = torch.randint(0, 3, (3, 80), generator=draw).sort(1).values
    if "padded" in family:
        batch["lengths"] = torch.tensor([80, 33, 1])
    if name == "bert":
        batch |= {"masked_positions": torch.tensor([[0, 30, 32]]).expand(3, 3), "labels": tokens(3)}
        batch |= {"loss_mask": torch.tensor([[1.0, 1, 1], [1, 1, 1], [1, 0, 0]])}
    if name == "t5":
        batch |= {"decoder_tokens": tokens(70), "labels": tokens(70), "loss_mask": torch.ones(3, 70)}
    losses, grads, calls = [], [], []
    kernel_of = ops.interval_attention

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        return kernel_of(*arguments)

    monkeypatch.setattr(ops, "interval_attention", counted)
    for kernel in ("auto", "reference"):
        section = ModelSection(family=name, attention=kernel, **sizes, **own.get(name, {}))
        model = build_model(section, ParallelContext.single(), seed=3)
        loss, _ = model.loss(batch)
        loss.backward()
        losses.append(loss)
        grads.append([param.grad for param in model.parameters() if param.grad is not None])
    assert len(calls) == (2 if ops.registry.cpu_loaded else 0)  # each layer, cross attention of T5, under auto alone
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
    for mine, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)
