"""The loop knows no task: any objective, any evaluator, and it does everything when it is due."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mlm_cli.checkpoint.folder import RunFolder
from mlm_cli.checkpoint.load import find_newest, load_state
from mlm_cli.checkpoint.save import Checkpointer, Identity
from mlm_cli.checkpoint.state import Position
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.training.engine import OptimizerSettings
from mlm_cli.training.engine_plain import PlainEngine
from mlm_cli.training.loop import Plan, train
from mlm_cli.training.monitor import Monitor
from mlm_cli.training.status import Status
from mlm_cli.training.stop import StopFlag

ONE = ParallelContext.single()


def samples(start: int) -> Iterator[dict[str, torch.Tensor]]:
    """Points of a line, two a micro-batch."""
    number = start
    while True:
        x = torch.tensor([[number % 7 / 7.0], [(number + 1) % 7 / 7.0]])
        yield {"x": x, "y": 3 * x - 1, "sample_ids": torch.tensor([number, number + 1])}
        number += 2


def regression(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    error = model(batch["x"]) - batch["y"]
    return error.square().mean(), {"tokens": len(error), "worst": error.detach().abs().max()}


def fit(folder: Path, steps: int, **plan: Any) -> dict[str, Any]:
    run = RunFolder(folder)
    run.path.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    engine = PlainEngine(nn.Linear(1, 1), ONE, OptimizerSettings(weight_decay=0.0), accumulation=2)
    seen: dict[str, Any] = {"saved": [], "evaluated": []}

    def write_model(target: Path, position: Position, metrics: Any) -> None:
        seen["saved"].append((position.step, dict(metrics)))

    def evaluator(model: nn.Module) -> dict[str, float]:
        seen["evaluated"].append(engine.updates)
        return {"valid_loss": float(model.weight.detach())}

    found = find_newest(run)
    start = load_state(found, engine, None, ONE) if found else Position(0, 0)
    checkpointer = Checkpointer(run, engine, ONE, write_model=write_model, identity=Identity("r"), keep_last=0)
    monitor = Monitor(run, Status(run, steps=steps), steps=steps, every=1, resumed_step=start.step)
    seen["end"], seen["signal"] = train(
        Plan(steps=steps, accumulation=2, global_batch_size=4, **plan),
        engine,
        samples(start.consumed_samples),
        regression,
        lambda step: 0.05,
        start=start,
        parallel=ONE,
        evaluator=evaluator,
        checkpointer=checkpointer,
        monitor=monitor,
        stop=StopFlag(),
    )
    monitor.close()
    seen["weight"] = float(engine.model.weight.detach())  # type: ignore[union-attr]
    return seen


def test_does_each_thing_when_it_is_due(tmp_path: Path) -> None:
    seen = fit(tmp_path, 10, checkpoint_every=4, evaluate_every=3)
    assert seen["evaluated"] == [3, 6, 9, 10]
    assert [step for step, _ in seen["saved"]] == [4, 8, 10]
    assert seen["end"] == Position(10, 40, {"tokens": 40}) and seen["signal"] is None
    assert "valid_loss" in seen["saved"][-1][1]


def test_learns_and_resumes(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", 200)
    assert whole["weight"] == pytest.approx(3.0, abs=0.1)
    fit(tmp_path / "parts", 77)
    assert fit(tmp_path / "parts", 200)["weight"] == whole["weight"]
    assert [step for step, _ in whole["saved"]] == [200]


def test_saves_what_the_job_calls_best(tmp_path: Path) -> None:
    def better(step: int, values: dict[str, float]) -> bool:
        return step == 4

    seen = fit(tmp_path, 6, evaluate_every=2, checkpoint_when=better)
    assert [step for step, _ in seen["saved"]] == [4, 6]
