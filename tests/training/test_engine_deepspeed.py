"""DeepSpeed's ZeRO 1, 2 and 3 give what the plain engine gives, says nothing, and shows its state by name."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from engine_cases import SETTINGS, engine_run, make_batches, make_model, objective

from mlm_cli.parallel.context import ParallelContext
from mlm_cli.training.ds_config import make_ds_config
from mlm_cli.training.engine_choice import build_engine

pytest.importorskip("deepspeed")


def _on_ranks(rank: int, size: int, zero: int) -> dict[str, Any]:
    parallel = ParallelContext.create()
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        runs = {
            f"{label} x{number}": engine_run("deepspeed", number, dtype, parallel, zero)
            for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
            for number in (2, 6)
        }
        safe = _survives_infinity(parallel, zero)
    return {"runs": runs, "said": said.getvalue(), "safe": safe, "fragments": _fragments(parallel, zero)}


def _survives_infinity(parallel: ParallelContext, zero: int) -> list[bool]:
    """An infinite input on the last rank alone: no rank changes any state."""
    verdicts = []
    for dtype in (torch.float32, torch.bfloat16):
        engine = build_engine(
            "deepspeed", make_model(), parallel, SETTINGS, dtype=dtype, accumulation=1, micro_batch_size=4, zero=zero
        )
        engine.accumulate(objective, make_batches(1, 1))
        engine.step(0.1)
        before = [fragment.tensors[kind].clone() for fragment in engine.fragments() for kind in fragment.tensors]
        (batch,) = make_batches(2, 1)
        if parallel.data.rank == parallel.data.size - 1:
            batch["x"][0, 0] = math.inf
        engine.accumulate(objective, [batch])
        norm = engine.step(0.1)
        after = [fragment.tensors[kind] for fragment in engine.fragments() for kind in fragment.tensors]
        same = all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
        verdicts.append(same and not math.isfinite(norm) and engine.updates == 1)
    return verdicts


@pytest.mark.parametrize(
    ("size", "zero"),
    [pytest.param(1, 1, marks=pytest.mark.slow), (2, 1), pytest.param(2, 2, marks=pytest.mark.slow), (2, 3)],
)
def test_agrees_with_the_plain_engine(size: int, zero: int, run_ranks: Callable[..., list[Any]]) -> None:
    plain = {
        f"{label} x{number}": engine_run("plain", number, dtype)
        for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        for number in (2, 6)
    }
    answers = run_ranks(_on_ranks, size, zero)
    _covered_once([answer["fragments"] for answer in answers])
    for answer in answers:
        for name, (losses, norms, weights) in answer["runs"].items():
            exact = name.startswith("fp32")
            assert losses == pytest.approx(plain[name][0], rel=1e-5 if exact else 1e-2), name
            assert norms == pytest.approx(plain[name][1], rel=1e-5 if exact else 2e-2), name
            for key, weight in weights.items():
                torch.testing.assert_close(
                    torch.from_numpy(weight),
                    torch.from_numpy(plain[name][2][key]),
                    rtol=1e-4 if exact else 0.1,
                    atol=1e-6 if exact else 2e-2,
                )
        assert [line for line in answer["said"].splitlines() if "fused kernels" not in line] == []
        assert answer["safe"] == [True, True]


def _fragments(parallel: ParallelContext, zero: int) -> list[tuple[str, int, int]]:
    engine = build_engine(
        "deepspeed",
        make_model(),
        parallel,
        SETTINGS,
        dtype=torch.bfloat16,
        accumulation=1,
        micro_batch_size=4,
        zero=zero,
    )
    return [(fragment.name, fragment.start, fragment.numel) for fragment in engine.fragments()]


def _covered_once(of_ranks: list[list[tuple[str, int, int]]]) -> None:
    """The fragments of all ranks together are every parameter, once."""
    covered: dict[str, list[tuple[int, int]]] = {}
    for fragments in of_ranks:
        for name, start, numel in fragments:
            if numel:
                covered.setdefault(name, []).append((start, start + numel))
    for name, parameter in make_model().named_parameters():
        ranges = sorted(covered[name])
        assert ranges[0][0] == 0 and ranges[-1][1] == parameter.numel()
        assert all(one[1] == two[0] for one, two in pairwise(ranges))


def test_the_json_adds_up() -> None:
    config = make_ds_config(micro_batch_size=2, accumulation=3, data_size=4, dtype=torch.bfloat16, num_parameters=101)
    assert config["train_batch_size"] == 24
    assert config["zero_optimization"]["stage"] == 1 and config["zero_optimization"]["reduce_bucket_size"] == 102
    assert config["bf16"]["enabled"] and config["data_types"]["grad_accum_dtype"] == "fp32"
    assert not config["zero_optimization"]["overlap_comm"] and not config["fp16"]["enabled"]
    common = {"micro_batch_size": 2, "accumulation": 3, "data_size": 4}
    on_gpus = make_ds_config(**common, dtype=torch.float16, zero=3, overlap=True, offload=True, pin_memory=True)
    zero = on_gpus["zero_optimization"]
    assert zero["overlap_comm"] and zero["contiguous_gradients"] and on_gpus["fp16"]["loss_scale"] == 0
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu", "pin_memory": True}
