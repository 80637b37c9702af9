"""Fewer passes of DeepSpeed's BF16_Optimizer change no bit: clipping, unused weights, updates passed over."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_cases import SETTINGS, make_batches
from torch import nn

from mlm_cli.parallel.context import ParallelContext
from mlm_cli.training import bf16_passes
from mlm_cli.training.engine_choice import build_engine

pytest.importorskip("deepspeed")


class TwoHeads(nn.Module):
    """The second head has a gradient on odd steps alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.one, self.two = nn.Linear(6, 24), nn.Linear(24, 5), nn.Linear(24, 5)

    def forward(self, x: torch.Tensor, odd: bool) -> torch.Tensor:
        hidden = torch.tanh(self.body(x))
        return self.one(hidden) + (self.two(hidden) if odd else 0.0)


def _run(parallel: ParallelContext, accumulation: int) -> dict[str, Any]:
    engine = build_engine(
        "deepspeed", TwoHeads(), parallel, SETTINGS, dtype=torch.bfloat16, accumulation=accumulation,
        micro_batch_size=4, zero=1,
    )  # fmt: skip
    norms = []
    for step in range(1, 9):
        odd = bool(step % 2)

        def objective(model: Any, batch: dict[str, torch.Tensor], odd: bool = odd) -> tuple[torch.Tensor, Any]:
            return (model(batch["x"].bfloat16(), odd).float() - batch["y"]).square().mean(), {}

        first = parallel.data.rank * accumulation
        engine.accumulate(objective, make_batches(step, accumulation, first=first))
        if step == 4:
            engine.discard()
        else:
            norms.append(engine.step(1e-2))
    tensors = [tensor.clone().numpy() for fragment in engine.fragments() for tensor in fragment.tensors.values()]
    return {"norms": norms, "tensors": tensors, "name": engine._zero._update_hp_grad.__module__}


def _both_ways(_rank: int, _size: int, accumulation: int) -> list[dict[str, Any]]:
    parallel = ParallelContext.create()
    ours = _run(parallel, accumulation)
    install, bf16_passes.install = bf16_passes.install, lambda _optimizer: False
    try:
        return [ours, _run(parallel, accumulation)]
    finally:
        bf16_passes.install = install


@pytest.mark.parametrize("accumulation", [1, 3])
def test_no_bit_changes(accumulation: int, run_ranks: Callable[..., list[Any]]) -> None:
    for ours, theirs in run_ranks(_both_ways, 2, accumulation):
        assert ours["name"] == "mlm_cli.training.bf16_passes" and theirs["name"].startswith("deepspeed.")
        assert ours["norms"] == theirs["norms"] and len(set(ours["norms"])) == 7
        for one, two in zip(ours["tensors"], theirs["tensors"], strict=True):
            assert one.dtype == two.dtype and (one == two).all()


def test_others_are_left_alone() -> None:
    assert not bf16_passes.install(SimpleNamespace())

    class BF16_Optimizer(SimpleNamespace):
        """Of another version, or with what is not looked at here."""

    names = dict.fromkeys(bf16_passes._NEEDED)
    assert not bf16_passes.install(BF16_Optimizer(partition_count=[2], has_moe_layers=False))
    assert not bf16_passes.install(BF16_Optimizer(**names, partition_count=[2], has_moe_layers=True))
    assert not bf16_passes.install(BF16_Optimizer(**names, partition_count=[2, 1], has_moe_layers=False))
    folding = {"autoep_folding_tp_group": object()}
    assert not bf16_passes.install(BF16_Optimizer(**names, **folding, partition_count=[2], has_moe_layers=False))
    assert bf16_passes.install(BF16_Optimizer(**names, partition_count=[2], has_moe_layers=False))
