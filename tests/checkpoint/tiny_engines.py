"""A small sliced model under a plain engine, for checkpoint tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlm_cli.checkpoint.folder import RunFolder
from mlm_cli.checkpoint.save import Checkpointer, Identity
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.layers import ColumnParallelLinear, RowParallelLinear
from mlm_cli.parallel.random import initialize
from mlm_cli.training.engine import OptimizerSettings
from mlm_cli.training.engine_plain import PlainEngine


class TinyModel(nn.Module):
    """A column-sliced layer of two blocks, a row-sliced layer, biases both sliced and not."""

    def __init__(self, parallel: ParallelContext) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(8, 32, parallel.tensor, bias=True, blocks=(16, 16), init_std=0.2)
        self.down = RowParallelLinear(16, 4, parallel.tensor, bias=True, init_std=0.2)
        initialize(self, parallel, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(torch.tanh(gate) * up)


def make_engine(parallel: ParallelContext, dtype: torch.dtype = torch.float32) -> PlainEngine:
    return PlainEngine(TinyModel(parallel), parallel, OptimizerSettings(), dtype=dtype)


def objective(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
    dtype = next(model.parameters()).dtype
    return model(batch["x"].to(dtype)).float().square().mean(), {"tokens": len(batch["x"])}


def take_steps(engine: PlainEngine, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last + 1):
        generator = torch.Generator().manual_seed(step)
        (outcome,) = engine.accumulate(objective, [{"x": torch.randn(6, 8, generator=generator)}])
        engine.step(0.01)
        losses.append(float(outcome.loss))
    return losses


def make_checkpointer(folder: Path, engine: PlainEngine, parallel: ParallelContext, **options: Any) -> Checkpointer:
    run = RunFolder(folder)
    run.path.mkdir(parents=True, exist_ok=True)

    def write_model(target: Path, position: Any, metrics: Any) -> None:
        if parallel.world.rank == 0:
            (target / "config.json").write_text(f'{{"step": {position.step}}}')

    return Checkpointer(run, engine, parallel, write_model=write_model, identity=Identity("recipe", "data"), **options)
