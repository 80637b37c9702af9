"""6 + 6 steps are 12 steps, by the SHA-256 of every file of model/ and state/; dropout on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pretrain_runs import fingerprints, losses, make_recipe, metrics, status, write_data

from mlm_cli import distributed
from mlm_cli.jobs import pretrain


def _straight_and_halved(rank: int, size: int, data: str, folder: str, cases: dict[str, dict[str, Any]]) -> None:
    distributed.shutdown = lambda: None  # type: ignore[assignment] # several runs in one process group
    for name, changes in cases.items():
        for output, counts in (("straight", (12,)), ("halved", (6, 12))):
            for steps in counts:
                more = {"train__steps": steps, **changes}
                if "train" in changes:
                    more = {**changes, "train": {**changes["train"], "steps": steps}}
                recipe = make_recipe(Path(data), Path(folder) / name / output / "run", **more)
                assert pretrain.run(recipe) == 0


def _check(folder: Path, names: list[str]) -> None:
    for name in names:
        straight, halved = folder / name / "straight" / "run", folder / name / "halved" / "run"
        assert losses(halved) == losses(straight), name
        expected = fingerprints(straight / "step-00000012")
        assert fingerprints(halved / "step-00000012") == expected, name
        assert any("state/rank" in file for file in expected) and "model/model.safetensors" in expected
        assert [record["step"] for record in metrics(halved)] == list(range(1, 13))
        first, last = losses(halved)[0], losses(halved)[-1]
        assert last < first, f"{name}: nothing was learned"
        if "loss_scale" in metrics(straight)[0]:
            overflows = [record["step"] for record in metrics(straight) if record.get("overflow")]
            assert overflows and overflows[-1] > 6, f"{name}: no overflow after the resume: {overflows}"


# Begins too high, and doubles again: several overflows, some of them after the resume.
FP16 = {
    "steps": 12,
    "micro_batch_size": 1,
    "global_batch_size": 4,
    "precision": "fp16",
    "initial_loss_scale": 2.0**17,
    "loss_scale_window": 1,
}
RAMPUP = {"start": 2, "increment": 2, "samples": 16}
CASES: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "one rank": (
        1,
        {
            "plain fp32": {},
            "plain bf16": {"train__precision": "bf16"},
            "plain bf16 recomputed": {"train__precision": "bf16", "train__recompute": "full"},
            "plain fp32 recomputed in part": {"train__recompute": "selective", "model__attention": "fused"},
            "plain fp16": {"train": FP16},
            "plain bf16 growing": {"train__precision": "bf16", "train__rampup": RAMPUP},
            "deepspeed fp32": {"train__engine": "deepspeed"},
            "deepspeed bf16": {"train__engine": "deepspeed", "train__precision": "bf16"},
        },
    ),
    "two ranks": (
        2,
        {
            "tensor fp32": {"parallel": {"tensor": 2}},
            "pipeline bf16 recomputed growing": {
                "parallel": {"pipeline": 2},
                "train__precision": "bf16",
                "train__recompute": "full",
                "train__rampup": RAMPUP,
            },
            "context bf16 recomputed": {
                "parallel": {"context": 2},
                "train__precision": "bf16",
                "train__recompute": "full",
            },
            "data zero-1 bf16": {"train__precision": "bf16"},
            "data zero-3 fp32": {"parallel": {"zero": 3}},
        },
    ),
}


SLOW: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "two ranks, more": (
        2,
        {
            "data zero-1 fp32": {},
            "pipeline fp32": {"parallel": {"pipeline": 2}},
            "tensor bf16": {"parallel": {"tensor": 2}, "train__precision": "bf16"},
            "tensor sequence bf16": {"parallel": {"tensor": 2, "sequence": True}, "train__precision": "bf16"},
            "data zero-0 fp32": {"parallel": {"zero": 0}},
            "data zero-2 bf16 growing": {"parallel": {"zero": 2}, "train__precision": "bf16", "train__rampup": RAMPUP},
            "data zero-3 bf16 recomputed": {
                "parallel": {"zero": 3},
                "train__precision": "bf16",
                "train__recompute": "full",
            },
        },
    ),
    "two ranks, fp16": (
        2,
        {
            "tensor": {"train": FP16, "parallel": {"tensor": 2}},
            "context": {"train": FP16, "parallel": {"context": 2}},
            "pipeline": {"train": FP16, "parallel": {"pipeline": 2}},
            "zero 1": {"train": FP16},
            "zero 2": {"train": FP16, "parallel": {"zero": 2}},
            "zero 3": {"train": FP16, "parallel": {"zero": 3}},
            "zero 3 offload": {"train": FP16, "parallel": {"zero": 3, "offload": "cpu"}},
            "zero 3 on a disk": {"train": FP16, "parallel": {"zero": 3, "offload": "nvme"}},
        },
    ),
}


@pytest.mark.parametrize("group", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_resuming_changes_no_bit(group: str, tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    size, cases = (CASES | SLOW)[group]
    data = write_data(tmp_path / "data")
    run_ranks(_straight_and_halved, size, str(data), str(tmp_path), cases, timeout=900.0)
    _check(tmp_path, list(cases))


def _continue_elsewhere(rank: int, size: int, data: str, folder: str, stages: list[dict[str, Any]]) -> list[int]:
    distributed.shutdown = lambda: None  # type: ignore[assignment]
    return [pretrain.run(make_recipe(Path(data), Path(folder), **changes)) for changes in stages]


def test_goes_on_in_another_layout(tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    """Without dropout (whose masks belong to a layout), the loss goes on as in the straight run."""
    data = write_data(tmp_path / "data")
    growing = {"start": 2, "increment": 2, "samples": 16}  # whole batches from step 10 on
    still = {"model__hidden_dropout": 0.0, "model__attention_dropout": 0.0, "train__rampup": growing}
    assert pretrain.run(make_recipe(data, tmp_path / "straight", **still)) == 0

    moving = tmp_path / "moving"
    assert pretrain.run(make_recipe(data, moving, train__steps=4, **still)) == 0
    stages = [
        {"parallel": {"tensor": 2}, "train__steps": 7, **still},
        {"parallel": {"pipeline": 2}, "train__steps": 8, **still},
        {"parallel": {"zero": 3}, "train__steps": 9, **still},
        {"parallel": {"zero": 2}, "train__steps": 10, **still},
        {"train__steps": 11, **still},  # data 2, ZeRO-1 on DeepSpeed
    ]
    assert run_ranks(_continue_elsewhere, 2, str(data), str(moving), stages) == [[0] * len(stages)] * 2
    assert pretrain.run(make_recipe(data, moving, **still)) == 0
    assert losses(moving) == pytest.approx(losses(tmp_path / "straight"), rel=1e-5)
    assert metrics(moving)[-1]["valid_loss"] == pytest.approx(
        metrics(tmp_path / "straight")[-1]["valid_loss"], rel=1e-5
    )
    assert status(moving)["state"] == "finished" and status(moving)["exit_code"] == 0
