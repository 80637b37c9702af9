"""`mlm pretrain RUN --verify` and `--replay STEP`: the same bits again, or an error that says where they differ."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrain_runs import fingerprints, losses, make_recipe, metrics, write_data
from safetensors.torch import load_file, save_file

from mlm_cli import distributed
from mlm_cli.checkpoint.manifest import MANIFEST, hash_file, read_manifest
from mlm_cli.config.requests import ReplayRequest
from mlm_cli.errors import CheckpointError, NumericsError, UsageError
from mlm_cli.jobs import pretrain, replay
from mlm_cli.training.replay import Difference, Report, first_difference

OBJECTIVE = pretrain.objective


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("corpus") / "data")


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "run"
    assert pretrain.run(make_recipe(data, run, checkpoint__every=4)) == 0
    return run


def copy_of(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def again(data: Path, run: Path, step: int | None = None, **changes: Any) -> Report:
    before = {path: path.read_bytes() for path in run.glob("*.json*")}
    names = sorted(path.name for path in run.iterdir())
    report, tells = replay.run(
        make_recipe(data, run, **{"checkpoint__every": 4, **changes}), ReplayRequest(str(run), step)
    )
    assert tells and sorted(path.name for path in run.iterdir()) == names
    assert before == {path: path.read_bytes() for path in run.glob("*.json*")}
    return report


def change_state(checkpoint: Path, kind: str, amount: float) -> None:
    """Change one number of a checkpoint by a little and make its manifest say that all is well."""
    path = checkpoint / "state" / "rank-00000.safetensors"
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as handle:
        about = handle.metadata()
    tensors = load_file(path)
    tensors[f"{kind}/layers.1.mlp.up.weight"][7] += amount
    save_file(tensors, path, about)
    manifest = read_manifest(checkpoint)
    manifest.files["state/rank-00000.safetensors"] = hash_file(path)
    (checkpoint / MANIFEST).write_text(manifest.to_json())


def test_verify_gives_the_loss_on_record_and_the_state_of_the_checkpoint(straight: Path, data: Path) -> None:
    report = again(data, straight)
    assert report.same and report.state_differs == [] and report.steps_compared == 4
    assert (report.step, report.from_step, report.loss) == (12, 8, losses(straight)[-1])
    kept = read_manifest(straight / "step-00000012").metrics
    assert (kept["loss"], kept["grad_norm"]) == (report.loss, report.grad_norm)
    replay.check(report)


def test_verify_without_an_earlier_checkpoint_starts_at_the_beginning(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert pretrain.run(make_recipe(data, run, checkpoint__every=0, log__every=100)) == 0
    report = again(data, run, checkpoint__every=0)
    assert report.same and report.from_step == 0 and report.steps_compared == 2  # the evaluation's and the last


@pytest.mark.parametrize("kind", ["master", "exp_avg_sq"])
def test_a_changed_checkpoint_fails(kind: str, straight: Path, data: Path, tmp_path: Path) -> None:
    """Both the one that is verified and the one it starts from; the smallest change is enough."""
    run = copy_of(straight, tmp_path)
    change_state(run / "step-00000012", kind, 1e-6)
    report = again(data, run)
    assert report.difference is None and report.state_differs == ["layers.1.mlp.up.weight"]
    with pytest.raises(
        CheckpointError, match=r"another state than step 12 gives: layers\.1\.mlp\.up\.weight"
    ) as caught:
        replay.check(report)
    assert caught.value.exit_code == 4

    second = copy_of(straight, tmp_path / "second")
    change_state(second / "step-00000008", kind, 1e-2)
    report = again(data, second)
    assert report.difference is not None and report.difference.step in (9, 10)
    with pytest.raises(CheckpointError, match="does not come out as it was recorded"):
        replay.check(report)


def test_a_damaged_checkpoint_is_not_passed_over(straight: Path, data: Path, tmp_path: Path) -> None:
    run = copy_of(straight, tmp_path)
    path = run / "step-00000012" / "state" / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged: state/rank-00000\.safetensors has another sha256"):
        again(data, run)


def test_a_changed_record_fails(straight: Path, data: Path, tmp_path: Path) -> None:
    run = copy_of(straight, tmp_path)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[10])
    record["loss"] = math.nextafter(record["loss"], 9.0)  # by one bit
    lines[10] = json.dumps(record)
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    report = again(data, run)
    assert report.difference is not None and (report.difference.step, report.difference.what) == (11, "loss")
    changed = again(data, copy_of(straight, tmp_path / "lr"), optimizer__lr=2e-3)
    with pytest.raises(CheckpointError, match=r"lr .* now") as caught:
        replay.check(changed)
    assert "learning rate" in (caught.value.hint or "")


def test_replay_tells_loss_norm_and_samples(straight: Path, data: Path) -> None:
    report = again(data, straight, 6)
    record = metrics(straight)[5]
    assert (report.from_step, report.loss, report.grad_norm) == (4, record["loss"], record["grad_norm"])
    assert report.samples == [20, 21, 22, 23] and report.state_differs is None and report.same
    assert f"{record['loss']!r} (the same)" in report.as_text() and "samples   20-23" in report.as_text()
    assert again(data, straight, 3).from_step == 0
    with pytest.raises(UsageError, match="no step 13"):
        again(data, straight, 13)


def test_replay_of_a_bad_step(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(model: Any, batch: Any) -> Any:
        loss, sums = OBJECTIVE(model, batch)
        return (loss * math.nan if 26 in batch["sample_ids"].tolist() else loss), sums

    monkeypatch.setattr(pretrain, "objective", spoiled)
    stopped = tmp_path / "stopped"
    with pytest.raises(NumericsError):
        pretrain.run(make_recipe(data, stopped, checkpoint__every=4))
    with pytest.raises(NumericsError, match="step 7: the loss is nan on rank 0, samples 26"):
        again(data, stopped, 7)
    assert again(data, stopped, 6).same

    skipping = tmp_path / "skipping"
    assert pretrain.run(make_recipe(data, skipping, checkpoint__every=4, train__on_bad_loss="skip")) == 0
    report = again(data, skipping, 7, train__on_bad_loss="skip")
    assert report.same and report.loss is None and report.bad is not None and report.bad["bad"] == "loss"
    rolling = tmp_path / "rolling"
    changes = {"train__on_bad_loss": "rollback", "checkpoint__every": 5}
    assert pretrain.run(make_recipe(data, rolling, **changes)) == 0
    for step in (6, 7, 10, None):  # step 6 was taken twice, before the bad one and after it
        report = again(data, rolling, step, **changes)
        assert report.same and report.loss == losses(rolling)[report.step - 1], step


LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor sequence": {"parallel": {"tensor": 2, "sequence": True}, "train__precision": "bf16"},
    "pipeline": {"parallel": {"pipeline": 2}},
    "zero 2": {"parallel": {"zero": 2}},
    "zero 3 recomputed": {"parallel": {"zero": 3}, "train__recompute": "full"},
}


def _on_ranks(rank: int, size: int, data: str, folder: str, names: list[str]) -> list[Any]:
    distributed.shutdown = lambda: None  # type: ignore[assignment]
    found = []
    for name in names:
        changes = LAYOUTS[name]
        recipe = make_recipe(Path(data), Path(folder) / name, checkpoint__every=8, **changes)
        assert pretrain.run(recipe) == 0
        report, tells = replay.run(recipe, ReplayRequest(str(Path(folder) / name)))
        found.append((report.same, report.from_step, report.samples, tells == (rank == 0)))
    return found


@pytest.mark.parametrize(
    "names", [["tensor sequence"], pytest.param([*LAYOUTS][1:], marks=pytest.mark.slow)], ids=["tensor", "others"]
)
def test_layouts_reproduce_themselves(
    names: list[str], data: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    answers = run_ranks(_on_ranks, 2, str(data), str(tmp_path), names)
    assert answers == [[(True, 8, [44, 45, 46, 47], True)] * len(names)] * 2
    with pytest.raises(UsageError, match="written by 2 ranks") as caught:
        again(data, tmp_path / names[0], checkpoint__every=8)
    assert "--nproc 2" in (caught.value.hint or "")


def _otherwise(rank: int, size: int, data: str, folder: str) -> list[str]:
    """What is said to ``--verify`` on the same ranks, with their state shared out otherwise."""
    distributed.shutdown = lambda: None  # type: ignore[assignment]
    run, said = Path(folder) / "run", []
    assert pretrain.run(make_recipe(Path(data), run, checkpoint__every=8)) == 0
    for started in (1, 3):  # in the end with ZeRO-3, which came to no checkpoint
        if rank == 0:
            text = (run / "recipe.yaml").read_text()
            (run / "recipe.yaml").write_text(text.replace("zero: 1", f"zero: {started}"))
        torch.distributed.barrier()
        with pytest.raises(UsageError) as caught:
            recipe = make_recipe(Path(data), run, checkpoint__every=8, parallel={"zero": 3})
            replay.run(recipe, ReplayRequest(str(run)))
        said.append(f"{caught.value.message} ({caught.value.hint})")
    return said


def test_a_state_shared_out_otherwise_is_refused(
    data: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    for by_recipe, by_state in run_ranks(_otherwise, 2, str(data), str(tmp_path)):
        assert "was written with parallel.zero=1; only the same" in by_recipe
        assert "leave out `parallel.zero=3`" in by_recipe
        assert "was written with another parallel.zero or train.engine" in by_state


def _half(rank: int, size: int, data: str, run: str) -> int:
    few = {"train__steps": 8, "schedule__decay_steps": 12, "checkpoint__every": 4}
    return pretrain.run(make_recipe(Path(data), Path(run), parallel={"tensor": 2}, **few))


def test_a_run_that_changed_its_ranks(data: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    """Where others took over lies a checkpoint: the same bits. Where it does not, the error says why they differ."""
    run = tmp_path / "run"
    assert run_ranks(_half, 2, str(data), str(run)) == [0, 0]
    assert pretrain.run(make_recipe(data, run, checkpoint__every=4, schedule__decay_steps=12)) == 0
    report = again(data, run, schedule__decay_steps=12)
    assert report.same and report.from_step == 8 and report.start_layout == "data 1 x pipeline 1 x tensor 2"
    replay.check(report)
    shutil.rmtree(run / "step-00000008")  # the steps from 4 to 8 are those of two ranks
    report = again(data, run, schedule__decay_steps=12)
    assert report.from_step == 4
    report.difference = report.difference or Difference(5, "loss", 1.0, 1.1)  # where one rank happens to round alike
    with pytest.raises(CheckpointError, match="does not come out as it was recorded") as caught:
        replay.check(report)
    assert "other ranks wrote the checkpoint of step 4 (data 1 x pipeline 1 x tensor 2)" in (caught.value.hint or "")


def test_the_command(tiny_text: Path, tmp_path: Path) -> None:
    """One document on stdout, the exit code, and refusals."""

    def mlm(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "mlm_cli", *words], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )

    assert mlm("preprocess", str(tiny_text), "--tokenizer", "bytes", "--output", "data").returncode == 0
    few = [
        "train.steps=4",
        "checkpoint.every=2",
        "evaluate.every=0",
        "log.tensorboard=false",
        "schedule.warmup_steps=1",
    ]
    done = mlm("pretrain", "debug/gpt", "data.path=data", "--output", "run", *few)
    assert done.returncode == 0, done.stderr
    before = fingerprints(tmp_path / "run" / "step-00000004")
    verified = mlm("pretrain", "run", "--verify", "--format", "json")
    assert verified.returncode == 0, verified.stderr
    assert json.loads(verified.stdout)["same"] is True and "bit for bit" in verified.stderr
    assert fingerprints(tmp_path / "run" / "step-00000004") == before
    manifest = read_manifest(tmp_path / "run" / "step-00000004")
    manifest.metrics["loss"] += 1e-9
    (tmp_path / "run" / "step-00000004" / MANIFEST).write_text(manifest.to_json())
    failed = mlm("pretrain", "run", "--verify")
    assert failed.returncode == 4 and failed.stderr.count("error: ") == 1 and "recorded" in failed.stdout
    assert mlm("pretrain", "run", "--verify", "--replay", "3").returncode == 2
    assert mlm("pretrain", "debug/gpt", "--verify").returncode == 2


def test_the_first_difference_is_found() -> None:
    one = {"loss": 1.5, "grad_norm": 2.0, "lr": 0.1}
    assert first_difference({3: one}, {}) == (None, 0)
    assert first_difference({3: one}, {3: one, 4: one}) == (None, 1)
    assert first_difference({3: one}, {3: {**one, "grad_norm": 2.5}})[0].what == "grad_norm"  # type: ignore[union-attr]
    assert first_difference({3: {**one, "loss": None}}, {3: one})[0].replayed is None  # type: ignore[union-attr]
