"""Bad losses: found, named, never applied, and the policy that follows repeats itself on resume."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_cases import SETTINGS, make_batches, make_model, objective
from torch import nn

from mlm_cli.checkpoint.state import Position
from mlm_cli.errors import NumericsError
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.training.agreement import StepReport
from mlm_cli.training.diagnosis import first_bad_layer, listed
from mlm_cli.training.engine import Outcome
from mlm_cli.training.engine_choice import build_engine
from mlm_cli.training.numerics import Numerics, Policy, Trouble

ONE = ParallelContext.single()


def report(loss: float) -> StepReport:
    return StepReport(loss, 8, math.isfinite(loss), None)


def follow(numerics: Numerics, losses: list[float], position: Position | None = None) -> tuple[list[int], Position]:
    """Steps found bad, and the position behind the last loss."""
    position, bad = position or Position(0, 0), []
    for loss in losses:
        step = position.step + 1
        if numerics.judge(step, report(loss), position) is not None:
            bad.append(step)
            position = position.after(step, 4)
        else:
            position = numerics.accept(loss, position.after(step, 4))
    return bad, position


CALM = [4.0 - 0.02 * step + 0.03 * ((7 * step) % 5) for step in range(40)]


def test_a_spike_is_found_and_a_falling_loss_is_none() -> None:
    numerics = Numerics(Policy(spike_zscore=6.0, spike_window=20))
    assert follow(numerics, CALM)[0] == []
    assert follow(numerics, [*CALM[:30], 9.0, *CALM[30:35], 8.0, 3.3])[0] == [31, 37]
    assert follow(Numerics(), [*CALM, 1e9])[0] == []  # switched off
    assert follow(Numerics(), [*CALM, math.nan])[0] == [41]  # this never is
    assert follow(numerics, [2.0] * 30 + [2.001, 2.5])[0] == [32]  # a loss without any spread


def test_a_resumed_run_judges_alike() -> None:
    losses = [*CALM[:20], 3.9, *CALM[20:30], 9.0, *CALM[30:]]
    policy = Policy(spike_zscore=4.0, spike_window=15)
    whole, end = follow(Numerics(policy), losses)
    first, middle = follow(Numerics(policy), losses[:25])
    second, again = follow(Numerics(policy), losses[25:], middle)
    assert first + second == whole != [] and again == end
    assert len(end.extra["recent_losses"]) == 15


def handle(numerics: Numerics, position: Position, trouble: Trouble | None = None) -> Position:
    model = make_model()
    batches = make_batches(1, 1)
    outcomes = [Outcome(torch.tensor(math.nan), {})]
    return numerics.handle(
        trouble or Trouble(position.step + 1, "loss", math.nan),
        position,
        4,
        model=model,
        objective=objective,
        outcomes=outcomes,
        batches=batches,
        parallel=ONE,
    )


def test_skip_counts_and_runs_out() -> None:
    numerics, position = Numerics(Policy("skip", budget=2)), Position(5, 20, {"tokens": 3})
    position = handle(numerics, position)
    assert position == Position(6, 24, {"tokens": 3, "bad_steps": 1})
    assert numerics.take_record()["bad_step"] == 6 and numerics.take_record() == {}
    position = handle(numerics, position)
    with pytest.raises(NumericsError, match="max_bad_steps 2 are used up"):
        handle(numerics, position)


def test_rollback_goes_back_without_the_samples_since() -> None:
    numerics = Numerics(Policy("rollback"), rollback=lambda: Position(4, 16, {"tokens": 1}))
    position = handle(numerics, Position(9, 36), Trouble(10, "spike", 9.0, 7.0))
    assert position == Position(4, 40, {"tokens": 1, "bad_steps": 1})
    assert numerics.take_record()["skipped_samples"] == [16, 40]


class Exploding(nn.Module):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.where == "output":
            return x / 0.0
        return torch.where(x > 1e9, torch.sqrt(x - 1e9), x * 1.0) + 0 * torch.sqrt(x * 0)  # gradient: 0 * inf


@pytest.mark.parametrize("where", ["output", "gradient"])
def test_the_first_bad_layer_is_named_and_nothing_is_touched(where: str) -> None:
    model = nn.Sequential(nn.Linear(6, 20), Exploding(where), nn.Dropout(0.5), nn.Linear(20, 5))
    (batch,) = make_batches(1, 1)
    before = torch.get_rng_state()
    assert first_bad_layer(model, objective, batch, gradient=where == "gradient") == ("1" if where == "output" else "0")
    assert torch.equal(before, torch.get_rng_state()) and model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    healthy = nn.Sequential(nn.Linear(6, 20), nn.Linear(20, 5))
    assert first_bad_layer(healthy, objective, batch, gradient=where == "gradient") is None


@pytest.mark.parametrize(
    ("kind", "zero", "offload"),
    [("plain", 1, False), *(("deepspeed", zero, False) for zero in (1, 2, 3)), ("deepspeed", 3, True)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [1, 2])
def test_a_discarded_step_leaves_no_trace(kind: Any, zero: int, offload: bool, dtype: torch.dtype, number: int) -> None:
    if kind == "deepspeed":
        pytest.importorskip("deepspeed")
    ends = []
    for discard in (False, True):
        engine = build_engine(
            kind,
            make_model(),
            ONE,
            replace(SETTINGS, loss_scale=64.0, loss_scale_window=2),
            dtype=dtype,
            accumulation=number,
            micro_batch_size=4,
            zero=zero,
            offload=offload,
        )
        for step in (1, 2, 3):
            if discard and step == 2:
                engine.accumulate(objective, make_batches(99, number))
                engine.discard()
                assert engine.updates == 1
                # a gradient that is bad by itself is passed over too
                spoiled = [{**batch, "y": batch["y"] * math.inf} for batch in make_batches(98, number)]
                before = None if engine.scaler is None else engine.scaler.state()
                engine.accumulate(objective, spoiled)
                assert not math.isfinite(engine.step(0.01)) and engine.updates == 1
                assert engine.overflowed is (dtype == torch.float16)
                if engine.scaler is not None and before is not None:
                    assert engine.scaler.state() != before
                    engine.scaler.load(before)
            engine.accumulate(objective, make_batches(step, number))
            assert math.isfinite(engine.step(0.01))
        assert engine.scaler is None or engine.scaler.scale > 64.0
        ends.append([tensor.clone() for one in engine.fragments() for tensor in one.tensors.values()])
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))


def test_numbers_are_listed_briefly() -> None:
    assert [listed(()), listed((3,)), listed((3, 4, 5)), listed((3, 5))] == ["unknown", "3", "3-5", "3, 5"]
    assert listed(range(0, 60, 2)).endswith("and 14 more")
