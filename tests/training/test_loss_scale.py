"""float16: the scale moves as DeepSpeed's does, an overflow costs a step alone, and the model learns as in fp32."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from mlm_cli.parallel.context import ParallelContext
from mlm_cli.training.engine import OptimizerSettings
from mlm_cli.training.engine_plain import PlainEngine
from mlm_cli.training.loss_scale import HYSTERESIS, MIN_SCALE, DeepSpeedScale, LossScale


def test_the_rule_is_deepspeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed import comm
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    chance = random.Random(5)
    ours = LossScale(2.0**6, window=3)
    theirs = DynamicLossScaler(1.0, 3, MIN_SCALE, HYSTERESIS, False, raise_error_at_min_scale=False)
    wrapped = DeepSpeedScale(theirs, 2.0**6)
    seen = set()
    monkeypatch.setattr(comm, "get_rank", lambda *_: 1)  # it would tell rank 0
    for number in range(400):
        overflow = chance.random() < (0.3 if number < 200 else 0.6)
        hopeless = wrapped.hopeless and overflow
        assert ours.update(overflow) is not hopeless
        theirs.update_scale(overflow)
        assert ours.state() == wrapped.state()
        seen.add(ours.scale)
    assert len(seen) > 5 and 1.0 in seen
    other = LossScale(1.0, window=3)
    other.load(wrapped.state())
    assert other == ours


def linear_engine(scale: float) -> tuple[PlainEngine, nn.Linear]:
    torch.manual_seed(0)
    model = nn.Linear(8, 8, bias=False)
    settings = OptimizerSettings(loss_scale=scale, loss_scale_window=1000)
    return PlainEngine(model, ParallelContext.single(), settings, dtype=torch.float16), model


def objective(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    return (model(batch["x"].half()).float() - 1.0).square().mean(), {}


def test_an_overflow_leaves_everything_as_it_was() -> None:
    engine, model = linear_engine(2.0**40)
    batch = {"x": torch.ones(4, 8)}
    before = {name: tensor.clone() for f in engine.fragments() for name, tensor in f.tensors.items()}
    scales = []
    for _ in range(4):
        engine.accumulate(objective, [batch])
        assert not math.isfinite(engine.step(1e-2)) and engine.overflowed and engine.updates == 0
        assert engine.scaler is not None and model.weight.grad is None
        scales.append(engine.scaler.scale)
    assert scales == [2.0**40, 2.0**39, 2.0**38, 2.0**37]  # the first is forgiven
    assert all(torch.equal(before[name], tensor) for f in engine.fragments() for name, tensor in f.tensors.items())


def test_small_gradients_survive() -> None:
    """A gradient of 1e-9 is zero in float16 and moves the weights where the loss is scaled."""

    def tiny(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return model(batch["x"].half()).float().sum() * 1e-9, {}

    for scale, moves in ((1.0, False), (2.0**16, True)):
        engine, _ = linear_engine(scale)
        engine.accumulate(tiny, [{"x": torch.ones(1, 8)}])
        norm = engine.step(1e-2)
        assert (norm > 0) is moves
        if moves:
            assert norm == pytest.approx(8e-9, rel=1e-2)


def test_an_overflow_at_the_smallest_scale_is_the_gradients_own() -> None:
    engine, _ = linear_engine(1.0)
    for number in range(2):
        engine.accumulate(lambda model, batch: (objective(model, batch)[0] * math.inf, {}), [{"x": torch.ones(4, 8)}])
        assert not math.isfinite(engine.step(1e-2))
        assert engine.overflowed is (number == 0)


def test_a_run_learns_as_in_float32(tmp_path: Path) -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))
    from pretrain_runs import losses, make_recipe, metrics, write_data

    from mlm_cli.jobs import pretrain

    data = write_data(tmp_path / "data")
    still = {"model__hidden_dropout": 0.0, "model__attention_dropout": 0.0, "evaluate__every": 0}
    changes = {"fp32": {}, "fp16": {"train__precision": "fp16", "train__initial_loss_scale": 2.0**10}}
    for name, more in changes.items():
        assert pretrain.run(make_recipe(data, tmp_path / name, **still, **more)) == 0
    one, other = losses(tmp_path / "fp32"), losses(tmp_path / "fp16")
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) < 5e-3
    assert not any(record.get("overflow") for record in metrics(tmp_path / "fp16"))
    assert metrics(tmp_path / "fp16")[0]["loss_scale"] == 1024.0
