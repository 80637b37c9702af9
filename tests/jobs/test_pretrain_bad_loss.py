"""`train.on_bad_loss` through a whole run: skip and rollback, logged, within a budget, the same after a resume."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrain_runs import fingerprints, losses, make_recipe, metrics, status, write_data

from mlm_cli import distributed
from mlm_cli.checkpoint.folder import RunFolder
from mlm_cli.checkpoint.manifest import read_manifest
from mlm_cli.config.checks import check
from mlm_cli.config.schema import Recipe
from mlm_cli.errors import NumericsError
from mlm_cli.jobs import pretrain

OBJECTIVE = pretrain.objective


def spoil(sample: int, factor: float) -> Callable[..., Any]:
    """The objective, with the loss of one sample multiplied whenever it is seen."""

    def objective(model: Any, batch: Any) -> Any:
        loss, sums = OBJECTIVE(model, batch)
        return (loss * factor if sample in batch["sample_ids"].tolist() else loss), sums

    return objective


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("corpus") / "data")


def test_skip_leaves_the_batch_out_and_resumes_alike(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrain, "objective", spoil(26, math.nan))  # in step 7
    changes = {"train__on_bad_loss": "skip", "checkpoint__every": 4}
    assert pretrain.run(make_recipe(data, tmp_path / "run", **changes)) == 0
    assert "step 7: the loss is nan on rank 0, samples 26" in capsys.readouterr().err
    records = metrics(tmp_path / "run")
    assert [record["step"] for record in records if record.get("skipped")] == [7]
    bad = records[6]
    assert bad["loss"] is None and bad["bad"] == "loss" and bad["bad_steps"] == 1 and bad["grad_norm"] is None
    assert records[-1]["tokens"] == 11 * 4 * 16
    manifest = read_manifest(tmp_path / "run/step-00000012")
    assert manifest.consumed_samples == 48

    halves = tmp_path / "halves" / "run"
    for steps in (6, 7, 12):
        assert pretrain.run(make_recipe(data, halves, train__steps=steps, **changes)) == 0
    assert fingerprints(halves / "step-00000012") == fingerprints(tmp_path / "run/step-00000012")
    assert losses(halves) == losses(tmp_path / "run")


def test_rollback_reads_other_samples_and_resumes_alike(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "objective", spoil(26, math.inf))  # in step 7
    changes = {"train__on_bad_loss": "rollback", "checkpoint__every": 4}
    run = tmp_path / "run"
    assert pretrain.run(make_recipe(data, run, **changes)) == 0
    records = metrics(run)
    assert [record["step"] for record in records] == list(range(1, 13))
    told = records[4]
    assert (told["bad_step"], told["skipped_samples"]) == (7, [16, 28])
    assert read_manifest(run / "step-00000012").consumed_samples == 48 + 12
    assert RunFolder(run).steps() == [0, 4, 8, 12]

    # killed right after it went back: the same happens again; killed later: it is remembered
    halves = tmp_path / "halves" / "run"
    for steps in (4, 5, 12):
        assert pretrain.run(make_recipe(data, halves, train__steps=steps, **changes)) == 0
    # `halves` has a checkpoint at 5, and so went back less far: only what was read since is left out
    assert read_manifest(halves / "step-00000012").consumed_samples == 48 + 8

    # begun from another run's checkpoint, and bad before the first of its own
    assert pretrain.run(make_recipe(data, tmp_path / "other", train__steps=5, train__on_bad_loss="rollback")) == 0
    branch = tmp_path / "branch"
    begin = {"checkpoint__resume": str(tmp_path / "other" / "step-00000005")}
    assert pretrain.run(make_recipe(data, branch, **changes, **begin)) == 0
    assert RunFolder(branch).steps() == [5, 8, 12]
    assert metrics(branch)[0]["skipped_samples"] == [20, 28]

    early = tmp_path / "early"
    monkeypatch.setattr(pretrain, "objective", spoil(1, math.nan))  # in step 1: back to the very beginning
    assert pretrain.run(make_recipe(data, early, **changes)) == 0
    assert metrics(early)[0]["bad_step"] == 1 and len(metrics(early)) == 12


def test_a_spike_is_passed_over_and_its_samples_are_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrain, "objective", spoil(53, 9.0))  # in step 14; the first verdict is that of step 11
    changes = {"train__spike_zscore": 8.0, "train__steps": 16, "checkpoint__every": 4, "evaluate__every": 0}
    run = tmp_path / "rollback"
    assert pretrain.run(make_recipe(data, run, train__on_bad_loss="rollback", **changes)) == 0
    assert "step 14: the loss spikes to" in capsys.readouterr().err
    told = next(record for record in metrics(run) if "bad_step" in record)
    # back at step 12, without what was read since
    assert (told["step"], told["bad_step"], told["bad"], told["skipped_samples"]) == (13, 14, "spike", [48, 56])
    with pytest.raises(NumericsError, match=r"step 14: the loss spikes to .*samples 52-55; the step was not taken"):
        pretrain.run(make_recipe(data, tmp_path / "stop", **changes))


def test_the_budget_ends_it_with_code_5(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "objective", lambda model, batch: (OBJECTIVE(model, batch)[0] * math.nan, {}))
    for policy in ("skip", "rollback"):
        with pytest.raises(NumericsError, match="max_bad_steps 3 are used up") as caught:
            pretrain.run(
                make_recipe(
                    data,
                    tmp_path / policy,
                    train__on_bad_loss=policy,
                    train__max_bad_steps=3,
                    checkpoint__every=4,
                )
            )
        assert caught.value.exit_code == 5 and status(tmp_path / policy)["exit_code"] == 5


def _nan_weight(rank: int, size: int, data: str, folder: str) -> list[str]:
    distributed.shutdown = lambda: None  # type: ignore[assignment]
    heard = []
    for layout in ({"tensor": 2}, {"zero": 1}):

        def objective(model: Any, batch: Any) -> Any:
            factor = math.nan if 11 in batch["sample_ids"].tolist() and rank == 1 else 1.0
            handle = model.layers[1].mlp.register_forward_hook(lambda module, given, out: out * factor, prepend=True)
            try:
                return OBJECTIVE(model, batch)
            finally:
                handle.remove()

        pretrain.objective = objective  # type: ignore[assignment]
        try:
            pretrain.run(make_recipe(Path(data), Path(folder) / next(iter(layout)), parallel=layout))
        except NumericsError as error:
            heard.append(error.message)
    return heard


class _BadGradient(torch.autograd.Function):
    """Identity whose gradient is not finite."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * math.inf


def _in_stages(rank: int, size: int, recipe: Recipe, cases: dict[str, tuple[int, bool]]) -> list[str]:
    """What a pipeline says when the blocks of one stage spoil their output, or the gradient that they are given."""
    distributed.shutdown = lambda: None  # type: ignore[assignment]
    from mlm_cli.models.block import Block

    forward, heard = Block.forward, []
    for name, (stage, gradient) in cases.items():

        def spoiled(self: Any, x: torch.Tensor, *more: Any, here: bool = rank == stage, grad: bool = gradient) -> Any:
            out = forward(self, x, *more)
            return out if not here else _BadGradient.apply(out) if grad else out * math.nan

        Block.forward = spoiled  # type: ignore[method-assign]
        try:
            pretrain.run(recipe.model_copy(update={"output": f"{recipe.output}-{name}"}))
        except NumericsError as error:
            heard.append(error.message)
        finally:
            Block.forward = forward  # type: ignore[method-assign]
    return heard


@pytest.mark.parametrize(
    ("changes", "first_layers"),
    [
        ({"parallel": {"pipeline": 2}}, ["layers.0", "layers.1"]),
        pytest.param(
            {"parallel": {"pipeline": 3}, "model__num_layers": 3, "train__recompute": "full"},
            ["layers.0", "layers.1", "layers.2"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["two stages", "three stages, recomputed"],
)
def test_stages_of_a_pipeline_are_named_too(
    data: Path, tmp_path: Path, changes: Any, first_layers: list[str], run_ranks: Callable[..., list[Any]]
) -> None:
    stages = range(len(first_layers))
    cases = {"loss": (0, False), **{f"gradient-{stage}": (stage, True) for stage in stages}}
    heard = run_ranks(_in_stages, len(stages), make_recipe(data, tmp_path / "run", **changes), cases)
    assert all(messages == heard[0] for messages in heard)
    of_the_loss, *of_gradients = heard[0]
    assert of_the_loss.startswith("step 1: the loss is nan on rank 0, samples 0-3;"), of_the_loss
    assert "first bad layer: layers.0" in of_the_loss
    for stage, message in enumerate(of_gradients):
        assert message.startswith("step 1: the gradient norm is inf (loss finite), "), message
        assert f"on rank {stage}, samples 0-3" in message
        assert f"first bad layer: {first_layers[stage]}." in message, message


def test_layer_rank_and_samples_are_named(data: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    first, second = run_ranks(_nan_weight, 2, str(data), str(tmp_path))
    assert first == second and len(first) == 2
    for message in first:
        assert message.startswith("step 3: the loss is nan on rank 1, samples 11;"), message
        assert "first bad layer: layers.1.mlp" in message


def test_rollback_without_checkpoints_is_refused(data: Path, tmp_path: Path) -> None:
    recipe = make_recipe(data, tmp_path, train__on_bad_loss="rollback", tokenizer="bytes")
    assert [mistake.keys for mistake in check(recipe, verb="pretrain")] == [("train.on_bad_loss", "checkpoint.every")]
