"""DeepSpeed's ZeRO 1, 2 and 3 give what the plain engine gives, says nothing, and shows its state by name."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from engine_cases import SETTINGS, engine_run, make_batches, make_model, objective

from mlm_cli import ops
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


def _never(*_: Any, **__: Any) -> None:
    raise AssertionError("a bucket of gradients was copied")


def _through_memory(rank: int, size: int) -> dict[str, Any]:
    """A run each way, and how many bytes went through the shared memory in the first."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    parallel = ParallelContext.create()
    shared = parallel.replicas.shared
    assert shared is not None
    moved = {"sum_": 0, "gather_": 0}
    for name in moved:
        original = getattr(shared, name)

        def counted(*tensors: torch.Tensor, name: str = name, original: Any = original) -> torch.Tensor:
            moved[name] += tensors[0].nbytes
            return original(*tensors)

        setattr(shared, name, counted)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with pytest.MonkeyPatch.context() as patch:  # gradients are averaged where they lie
            for owner in (DeepSpeedEngine, DeepSpeedZeroOptimizer):
                patch.setattr(owner, "allreduce_and_copy", _never)
            first = engine_run("deepspeed", 2, torch.float32, parallel, 1)
            engine_run("deepspeed", 2, torch.bfloat16, parallel, 1)
        alone = dataclasses.replace(parallel.replicas, shared=None)
        counts = dict(moved)
        second = engine_run("deepspeed", 2, torch.float32, dataclasses.replace(parallel, replicas=alone, data=alone), 1)
    return {"counts": counts, "after": moved, "runs": (first, second)}


@pytest.mark.skipif(not ops.serves_shared_memory(), reason="kernels are not built")
def test_cpu_ranks_of_one_machine_use_shared_memory(run_ranks: Callable[..., list[Any]]) -> None:
    num_bytes = 4 * sum(parameter.numel() for parameter in make_model().parameters())
    for answer in run_ranks(_through_memory, 2):
        counts, (first, second) = answer["counts"], answer["runs"]
        assert counts["sum_"] >= num_bytes * len(first[0]) and counts["gather_"] >= num_bytes * len(first[0])
        assert answer["after"] == counts, "without shared memory nothing goes through it"
        assert first[:2] == second[:2]  # two ranks: gloo adds in the same order
        for key, weight in first[2].items():
            assert (weight == second[2][key]).all()
