"""The plain engine against torch's AdamW, clipping and accumulation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_cases import SETTINGS, engine_run, make_batches, make_model, objective, reference_run

from mlm_cli.errors import UsageError
from mlm_cli.parallel.context import Group, ParallelContext
from mlm_cli.parallel.layers import ColumnParallelLinear, RowParallelLinear
from mlm_cli.parallel.random import initialize
from mlm_cli.training.engine import OptimizerSettings
from mlm_cli.training.engine_choice import choose_engine
from mlm_cli.training.engine_plain import PlainEngine


@pytest.mark.parametrize("number", [1, 3])
def test_float32_is_torchs_adamw(number: int) -> None:
    losses, norms, model = reference_run(number)
    ours, our_norms, weights = engine_run("plain", number, torch.float32)
    assert ours == pytest.approx(losses, rel=1e-5)
    assert our_norms == pytest.approx(norms, rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(torch.from_numpy(weights[name]), parameter.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("number", [1, 4])
def test_bfloat16_stays_near_float32_and_keeps_float32_masters(number: int) -> None:
    losses, norms, _ = reference_run(number)
    ours, our_norms, weights = engine_run("plain", number, torch.bfloat16)
    assert ours == pytest.approx(losses, rel=2e-2)
    assert our_norms == pytest.approx(norms, rel=5e-2)
    rounded = torch.from_numpy(weights["0.weight"]).bfloat16().float()
    assert not torch.equal(rounded, torch.from_numpy(weights["0.weight"]))


def test_many_small_gradients_add_up_in_float32() -> None:
    """256 equal gradients: a bfloat16 sum would stop growing at 2^8 times the addend."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    engine = PlainEngine(
        model, ParallelContext.single(), OptimizerSettings(clip_grad=0.0), dtype=torch.bfloat16, accumulation=512
    )

    def plain_sum(module: Any, batch: Any) -> Any:
        return module(batch["x"]).float().sum() * 1.01, {}

    engine.accumulate(plain_sum, [{"x": torch.ones(1, 1, dtype=torch.bfloat16)}] * 512)
    assert engine.step(0.0) == pytest.approx(1.01, rel=4e-3)


def test_nothing_is_applied_when_the_gradient_is_not_finite() -> None:
    for dtype, number in ((torch.float32, 1), (torch.bfloat16, 2)):
        engine = PlainEngine(make_model(), ParallelContext.single(), SETTINGS, dtype=dtype, accumulation=number)
        engine.accumulate(objective, make_batches(1, number))
        engine.step(0.1)
        before = [fragment.tensors[kind].clone() for fragment in engine.fragments() for kind in fragment.tensors]
        weights = [p.detach().clone() for p in engine.model.parameters()]
        batches = make_batches(2, number)
        batches[-1]["x"][0, 0] = math.inf
        engine.accumulate(objective, batches)
        assert not math.isfinite(engine.step(0.1))
        after = [fragment.tensors[kind] for fragment in engine.fragments() for kind in fragment.tensors]
        assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
        assert all(torch.equal(one, two) for one, two in zip(weights, engine.model.parameters(), strict=True))
        assert engine.updates == 1
        engine.accumulate(objective, make_batches(3, number))
        assert math.isfinite(engine.step(0.1))  # the bad gradient is forgotten


def test_the_norm_of_large_bfloat16_gradients() -> None:
    """They are widened piece by piece; a short last piece and an infinity are part of it."""
    model = torch.nn.Linear(1000, 700, bias=True)
    engine = PlainEngine(model, ParallelContext.single(), OptimizerSettings(), dtype=torch.bfloat16)
    x = torch.randn(8, 1000, generator=torch.Generator().manual_seed(1)).bfloat16()
    for spoiled in (False, True):
        engine.accumulate(lambda module, batch: (module(batch["x"]).float().square().mean(), {}), [{"x": x}])
        grads = [p.grad for p in model.parameters()]
        if spoiled:
            grads[0][-1, -1] = math.inf  # type: ignore[index]
        expected = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads if grad is not None))
        assert engine.step(1e-3) == pytest.approx(expected, rel=1e-5)


def test_decays_matrices_only() -> None:
    model = make_model()
    decays = {name: SETTINGS.of(p).weight_decay for name, p in model.named_parameters()}
    assert decays == {"0.weight": 0.1, "0.bias": 0.0, "2.weight": 0.0, "2.bias": 0.0, "3.weight": 0.1}


def _two_data_ranks(rank: int, size: int) -> Any:
    return engine_run("plain", 4, torch.float32, ParallelContext.create())


def test_data_ranks_average_to_one_rank_with_all_batches(run_ranks: Callable[..., list[Any]]) -> None:
    losses, norms, model = reference_run(4)
    for ours, our_norms, weights in run_ranks(_two_data_ranks, 2):
        assert ours == pytest.approx(losses, rel=1e-5)
        assert our_norms == pytest.approx(norms, rel=1e-5)
        reference = dict(model.named_parameters())["0.weight"].detach()
        torch.testing.assert_close(torch.from_numpy(weights["0.weight"]), reference, rtol=1e-4, atol=1e-6)


class Sliced(torch.nn.Module):
    def __init__(self, group: Group) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)
        self.up = ColumnParallelLinear(8, 16, group, bias=True, init_std=0.3)
        self.down = RowParallelLinear(16, 8, group, bias=True, init_std=0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))


def _sliced_norm(rank: int, size: int) -> list[float]:
    parallel = ParallelContext.create(tensor=size)
    model = Sliced(parallel.tensor)
    for name, parameter in model.norm.named_parameters():
        parameter.init = "ones" if name == "weight" else "zeros"  # type: ignore[attr-defined]
    initialize(model, parallel, 1)
    engine = PlainEngine(model, parallel, OptimizerSettings(clip_grad=0.1))
    norms = []
    for step in range(3):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        engine.accumulate(lambda module, batch: (module(batch["x"]).square().mean(), {}), [{"x": x}])
        norms.append(engine.step(1e-2))
    return norms


def test_the_norm_counts_what_every_tensor_rank_holds_once(run_ranks: Callable[..., list[Any]]) -> None:
    whole = _sliced_norm(0, 1)
    first, second = run_ranks(_sliced_norm, 2)
    assert first == second == pytest.approx(whole, rel=1e-5)


def test_which_engine_a_layout_gets() -> None:
    one, two = ParallelContext.single(), ParallelContext(replicas=Group(0, 2, None, (0, 1)))
    assert choose_engine("auto", zero=1, parallel=one) == "plain"
    assert choose_engine("auto", zero=1, parallel=two) == "deepspeed"
    assert choose_engine("auto", zero=0, parallel=two) == "plain"
    assert choose_engine("deepspeed", zero=1, parallel=one) == "deepspeed"
    with pytest.raises(UsageError, match="needs parallel"):
        choose_engine("deepspeed", zero=0, parallel=one)
    with pytest.raises(UsageError, match="cannot shard"):
        choose_engine("plain", zero=1, parallel=two)
