"""Sums through shared memory, against the same sums done by gloo and in float64."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mlm_cli import ops
from mlm_cli.parallel.context import ParallelContext

pytestmark = pytest.mark.skipif(not ops.serves_shared_memory(), reason="kernels are not built")
SIZES = (1, 2, 17, 97, 4096, 300_001, 3_000_000)  # the last ones take several rounds; 97 are three lines and a bit


def _sums(rank: int, world_size: int) -> dict[str, Any]:
    group = ParallelContext.create(tensor=world_size).tensor
    assert group.shared is not None
    worst, same = 0.0, True
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for size in SIZES:
            parts = [
                torch.randn(size, generator=torch.Generator().manual_seed(size + r)).to(dtype)
                for r in range(world_size)
            ]
            ours = group.all_reduce_(parts[rank].clone())
            exact = torch.stack([part.double() for part in parts]).sum(0)
            worst = max(worst, float((ours.double() - exact).abs().max() / torch.finfo(dtype).eps))
            everyone = [torch.empty_like(ours) for _ in range(world_size)]
            dist.all_gather(everyone, ours)
            same = same and all(torch.equal(other, ours) for other in everyone)
            gathered = group.all_gather(parts[rank].view(1, -1))
            same = same and all(torch.equal(a[0], b) for a, b in zip(gathered, parts, strict=True))
            out = torch.empty(world_size * size, dtype=dtype)
            mine = out[rank * size : (rank + 1) * size].copy_(parts[rank])
            same = same and torch.equal(group.shared.gather_(out, mine), torch.cat(parts))
    strided = torch.arange(8.0).view(2, 4).t()  # goes through gloo
    return {"worst": worst, "same": same, "strided": group.all_reduce_(strided.clone().t()).numpy()}


@pytest.mark.parametrize("world_size", [2, 3])
def test_sums_are_exact_to_rounding_and_equal_on_all_ranks(run_ranks: Any, world_size: int) -> None:
    for answer in run_ranks(_sums, world_size):
        assert answer["same"]
        assert answer["worst"] < 8  # in units of the dtype's rounding: sums are below 16 in size, rounded once
        np.testing.assert_array_equal(answer["strided"], world_size * np.arange(8.0).reshape(2, 4))


def _in_turn(rank: int, world_size: int) -> list[float]:
    """Many rounds back to back, one rank always late: a slot that is overwritten too early would show."""
    group = ParallelContext.create(tensor=world_size).tensor
    totals = []
    for step in range(300):
        if (step + rank) % 7 == 0:
            torch.randn(40_000).sort()
        totals.append(float(group.all_reduce_(torch.full((1000,), float(step * (rank + 1)))).mean()))
    return totals


def test_rounds_do_not_run_into_each_other(run_ranks: Any) -> None:
    for totals in run_ranks(_in_turn, 2):
        assert totals == [3.0 * step for step in range(300)]


def _late(rank: int, world_size: int) -> str:
    group = ParallelContext.create(tensor=world_size).tensor
    assert group.shared is not None
    message = ""
    if rank == 0:
        group.shared.timeout = 0.2
        with pytest.raises(RuntimeError) as caught:
            group.all_reduce_(torch.ones(3))
        message = str(caught.value)
    group.barrier()
    return message


def test_a_rank_that_never_comes_is_an_error_not_a_hang(run_ranks: Any) -> None:
    assert "rank 1 of the group has not come for 0.2" in run_ranks(_late, 2)[0]


def _declined(rank: int, world_size: int) -> bool:
    os.environ["MLM_SHARED_MEMORY"] = "0" if rank == 1 else "1"
    group = ParallelContext.create(tensor=world_size).tensor
    total = group.all_reduce_(torch.ones(2))
    return group.shared is None and total.tolist() == [2.0, 2.0]


def test_one_rank_that_declines_declines_for_all(run_ranks: Any) -> None:
    assert run_ranks(_declined, 2) == [True, True]


def test_nothing_is_left_behind() -> None:
    assert not list(Path("/dev/shm").glob("mlm-*"))
