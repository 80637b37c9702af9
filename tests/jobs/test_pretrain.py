"""`mlm pretrain` from recipe to run folder, and everything that can get in its way."""

from __future__ import annotations

import errno
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrain_runs import fingerprints, losses, make_recipe, metrics, status, write_data

from mlm_cli import distributed
from mlm_cli.checkpoint import tensor_file
from mlm_cli.checkpoint.folder import RunFolder
from mlm_cli.checkpoint.hub import load_model_folder, resolve_model
from mlm_cli.checkpoint.manifest import read_manifest
from mlm_cli.config.resolve import resolve_recipe, write_recipe
from mlm_cli.errors import CheckpointError, MlmError, NumericsError, ResourceError, UsageError
from mlm_cli.jobs import pretrain
from mlm_cli.parallel.context import ParallelContext

OBJECTIVE = pretrain.objective


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("corpus") / "data")


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 12 steps with a checkpoint every 4."""
    run = tmp_path_factory.mktemp("straight") / "run"
    assert pretrain.run(make_recipe(data, run, checkpoint__every=4)) == 0
    return run


def at_micro_batch(number: int, act: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """The objective, with ``act`` done to the loss of the ``number``-th micro-batch (4 a step)."""
    count = 0

    def objective(model: Any, batch: Any) -> Any:
        nonlocal count
        count += 1
        loss, sums = OBJECTIVE(model, batch)
        return (act(loss) if count == number else loss), sums

    return objective


def test_leaves_the_run_folder_of_the_design(straight: Path, data: Path) -> None:
    assert sorted(path.name for path in straight.iterdir() if not path.name.startswith(".")) == [
        "latest",
        "metrics.jsonl",
        "recipe.yaml",
        "status.json",
        "step-00000004",
        "step-00000008",
        "step-00000012",
    ]
    records = metrics(straight)
    assert [record["step"] for record in records] == list(range(1, 13))
    keys = ["loss", "grad_norm", "lr", "tokens", "tokens_per_s", "tflops", "mfu", "mem", "data_time"]
    assert all(key in record for record in records for key in keys)
    assert records[0]["tokens_per_s"] is None  # the first step pays for memory and threads: unknown, not 0
    assert records[-1]["tokens"] == 12 * 4 * 16 and 0 < records[-1]["mfu"] < 1
    assert records[-1]["loss"] < records[0]["loss"]
    assert [record["step"] for record in records if "valid_loss" in record] == [6, 12]
    assert status(straight)["state"] == "finished" and status(straight)["exit_code"] == 0
    manifest = read_manifest(straight / "step-00000012")
    assert (manifest.step, manifest.consumed_samples) == (12, 48)
    again = resolve_recipe(str(straight))
    assert again.train.global_batch_size == 4 and again.model.vocab_size == 96
    assert again.data.path == str(data)


def test_model_folder_holds_the_float32_masters(straight: Path) -> None:
    from safetensors.torch import load_file

    model, section = load_model_folder(resolve_model(straight), ParallelContext.single())
    assert section.num_layers == 2
    state = load_file(straight / "step-00000012/state/rank-00000.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.detach().reshape(-1)[:1000], state[f"master/{name}"][: parameter.numel()][:1000])


def test_a_complete_run_says_so(straight: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = fingerprints(straight / "step-00000012")
    assert pretrain.run(make_recipe(data, straight, checkpoint__every=4)) == 0
    assert "is complete: 12 steps" in capsys.readouterr().err
    assert fingerprints(straight / "step-00000012") == before and len(metrics(straight)) == 12


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_within_one_step(
    number: signal.Signals, code: int, straight: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(loss: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), number)
        return loss

    run = tmp_path / "run"
    monkeypatch.setattr(pretrain, "objective", at_micro_batch(4 * 4 + 2, ask))  # in step 5
    assert pretrain.run(make_recipe(data, run, checkpoint__every=4)) == code
    assert RunFolder(run).steps() == [4, 5]
    assert status(run)["state"] == "stopped" and status(run)["exit_code"] == code and status(run)["step"] == 5
    monkeypatch.undo()
    assert pretrain.run(make_recipe(data, run, checkpoint__every=4)) == 0
    assert fingerprints(run / "step-00000012") == fingerprints(straight / "step-00000012")
    assert losses(run) == losses(straight)
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def _signal_on_one_rank(rank: int, size: int, data: str, folder: str) -> int:
    if rank == 1:

        def ask(loss: torch.Tensor) -> torch.Tensor:
            os.kill(os.getpid(), signal.SIGTERM)
            return loss

        pretrain.objective = at_micro_batch(4 * 2 + 1, ask)  # type: ignore[assignment] # in step 3
    return pretrain.run(make_recipe(Path(data), Path(folder), parallel={"tensor": 2}))


def _nan_on_one_rank(rank: int, size: int, data: str, folder: str) -> list[Any]:
    distributed.shutdown = lambda: None  # type: ignore[assignment]
    heard: list[Any] = []
    for name in ("plain", "deepspeed"):
        pretrain.objective = at_micro_batch(6, lambda loss: loss * math.nan) if rank == 1 else OBJECTIVE
        try:
            zero = {"zero": 0 if name == "plain" else 1}
            heard.append(pretrain.run(make_recipe(Path(data), Path(folder) / name, parallel=zero, checkpoint__every=2)))
        except NumericsError as error:
            heard.append(error.message)
    return heard


def test_ranks_agree_on_signals_and_on_nan(data: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    assert run_ranks(_signal_on_one_rank, 2, str(data), str(tmp_path / "stopped")) == [75, 75]
    assert RunFolder(tmp_path / "stopped").steps() == [3]

    # two data ranks of two micro-batches: the sixth of rank 1 is in step 3, global sample 2 * 4 + 1 * 2 + 1
    first, second = run_ranks(_nan_on_one_rank, 2, str(data), str(tmp_path / "nan"))
    assert first == second
    for message in first:
        assert message.startswith("step 3: the loss is nan on rank 1, samples 11;")
    for name in ("plain", "deepspeed"):
        assert RunFolder(tmp_path / "nan" / name).steps() == [2]
        assert status(tmp_path / "nan" / name)["exit_code"] == 5


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_nan_is_never_applied(
    kind: str, straight: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(loss: torch.Tensor) -> torch.Tensor:
        if kind == "loss":
            return loss * math.inf
        loss.register_hook(lambda grad: grad * math.nan)
        return loss

    run = tmp_path / "run"
    monkeypatch.setattr(pretrain, "objective", at_micro_batch(4 * 6 + 3, spoil))  # step 7, sample 26
    with pytest.raises(NumericsError) as caught:
        pretrain.run(make_recipe(data, run, checkpoint__every=4))
    assert caught.value.exit_code == 5
    expected = "samples 26" if kind == "loss" else "samples 24-27"
    assert caught.value.message.startswith("step 7: ") and expected in caught.value.message
    assert RunFolder(run).steps() == [4]
    assert status(run)["state"] == "failed" and status(run)["exit_code"] == 5
    assert [record["step"] for record in metrics(run)] == [1, 2, 3, 4, 5, 6]
    monkeypatch.undo()
    assert pretrain.run(make_recipe(data, run, checkpoint__every=4)) == 0
    assert fingerprints(run / "step-00000012") == fingerprints(straight / "step-00000012")


def test_killed_and_started_again_ends_like_an_uninterrupted_run(data: Path, tmp_path: Path) -> None:
    changes = {"train__steps": 120, "checkpoint__every": 20, "checkpoint__keep_last": 3, "evaluate__every": 0}
    calm = tmp_path / "calm" / "run"
    assert pretrain.run(make_recipe(data, calm, **changes)) == 0

    killed = tmp_path / "killed" / "run"
    write_recipe(make_recipe(data, killed, **changes), tmp_path / "recipe.yaml")
    code = "import sys\nfrom mlm_cli.config.resolve import resolve_recipe\nfrom mlm_cli.jobs import pretrain\n"
    command = [sys.executable, "-c", code + "sys.exit(pretrain.run(resolve_recipe(sys.argv[1])))"]
    victim = subprocess.Popen([*command, str(tmp_path / "recipe.yaml")], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not RunFolder(killed).steps() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert status(killed)["state"] == "running"
    subprocess.run([*command, str(tmp_path / "recipe.yaml")], check=True, stderr=subprocess.DEVNULL)
    assert fingerprints(killed / "step-00000120") == fingerprints(calm / "step-00000120")
    assert [record["step"] for record in metrics(killed)] == list(range(1, 121))
    assert losses(killed) == losses(calm)
    assert not [path for path in killed.iterdir() if path.name.startswith((".tmp", ".trash"))]


def copy_of(run: Path, tmp_path: Path) -> Path:
    target = tmp_path / "run"
    shutil.copytree(run, target)
    return target


def test_a_damaged_checkpoint_is_passed_over(
    straight: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(straight, tmp_path)
    expected = fingerprints(run / "step-00000012")
    weights = run / "step-00000012/model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    assert pretrain.run(make_recipe(data, run, checkpoint__every=4)) == 0
    said = capsys.readouterr().err
    assert "warning: damaged checkpoint passed over: step-00000012: model/model.safetensors has" in said
    assert "warning: falling back to step-00000008" in said
    assert fingerprints(run / "step-00000012") == expected


def test_no_sound_checkpoint_is_exit_4(straight: Path, data: Path, tmp_path: Path) -> None:
    run = copy_of(straight, tmp_path)
    for step in (4, 8, 12):
        (run / f"step-{step:08d}/state/rank-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint of") as caught:
        pretrain.run(make_recipe(data, run, checkpoint__every=4))
    assert caught.value.exit_code == 4
    assert caught.value.message.count("state/rank-00000.safetensors is missing") == 3


FAILURES = {
    "full": (errno.ENOSPC, ResourceError, "disk full while writing", 7),
    "quota": (errno.EDQUOT, ResourceError, "disk full while writing", 7),
    "read-only": (errno.EROFS, CheckpointError, "Read-only file system while writing", 4),
    "broken": (errno.EIO, CheckpointError, "Input/output error while writing", 4),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_disk_that_fails_while_saving_costs_nothing(
    failure: str, straight: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, kind, words, code = FAILURES[failure]
    run = tmp_path / "run"
    real = tensor_file.os.fsync

    def full(descriptor: int) -> None:
        if (run / "step-00000004").exists():
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(tensor_file.os, "fsync", full)
    with pytest.raises(kind, match=words) as caught:
        pretrain.run(make_recipe(data, run, checkpoint__every=4))
    monkeypatch.undo()
    assert caught.value.exit_code == code
    assert RunFolder(run).steps() == [4] and status(run)["exit_code"] == code
    assert not list(run.glob(".tmp*"))
    assert pretrain.run(make_recipe(data, run, checkpoint__every=4)) == 0
    assert fingerprints(run / "step-00000012") == fingerprints(straight / "step-00000012")


@pytest.mark.parametrize("damage", ["empty latest", "no latest", "flipped bit", "no manifest"])
def test_what_a_crash_may_leave_is_no_obstacle(damage: str, straight: Path, data: Path, tmp_path: Path) -> None:
    run = copy_of(straight, tmp_path)
    expected = fingerprints(run / "step-00000012")
    shutil.rmtree(run / "step-00000012")
    if damage == "empty latest":
        (run / "latest").write_text("")
    elif damage == "no latest":
        (run / "latest").unlink()
    elif damage == "no manifest":
        (run / "step-00000008/manifest.json").unlink()
    else:
        path = run / "step-00000008/state/rank-00000.safetensors"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 16
        path.write_bytes(content)
    assert pretrain.run(make_recipe(data, run, checkpoint__every=4)) == 0
    assert fingerprints(run / "step-00000012") == expected
    assert (run / "latest").read_text() == "step-00000012\n"


def test_too_little_space_is_found_before_step_1(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=300_000))
    with pytest.raises(ResourceError, match="3 checkpoints of"):
        pretrain.run(make_recipe(data, tmp_path / "run", checkpoint__every=4, checkpoint__keep_last=5))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


REFUSED = {
    "model": ({"model__num_layers": 3}, r"model\.num_layers: 2 -> 3"),
    "seed": ({"seed": 8}, "seed: 7 -> 8"),
    "batch": ({"train__global_batch_size": 8}, r"train\.global_batch_size: 4 -> 8"),
    "never": ({"checkpoint__resume": "never"}, "holds checkpoints up to step 12"),
    "data": ({"data__split": "50,50,0"}, "trained on other data"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_run_in_the_same_folder_is_refused(case: str, straight: Path, data: Path) -> None:
    changes, message = REFUSED[case]
    before = fingerprints(straight / "step-00000012")
    with pytest.raises(UsageError, match=message):
        pretrain.run(make_recipe(data, straight, train__steps=16, **changes))
    assert fingerprints(straight / "step-00000012") == before


def test_a_folder_in_use_is_refused(data: Path, tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run").lock(), pytest.raises(UsageError, match="is in use by"):
        pretrain.run(make_recipe(data, tmp_path / "run"))


def test_resumes_from_a_named_checkpoint(
    straight: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(straight, tmp_path)
    expected = fingerprints(run / "step-00000012")
    # back within the run: later checkpoints are put aside, and made anew
    assert pretrain.run(make_recipe(data, run, checkpoint__every=4, checkpoint__resume=str(run / "step-00000004"))) == 0
    assert fingerprints(run / "step-00000012") == expected
    assert (run / "replaced-step-00000012").is_dir()
    # a requeued job gives the same command again: it goes on where it was
    shutil.rmtree(run / "step-00000012")
    mark = (run / "step-00000008" / "manifest.json").stat().st_mtime_ns
    back = make_recipe(data, run, checkpoint__every=4, checkpoint__resume=str(run / "step-00000004"))
    assert pretrain.run(back) == 0
    assert "step-00000004 already and goes on" in capsys.readouterr().err
    assert (run / "step-00000008" / "manifest.json").stat().st_mtime_ns == mark
    assert fingerprints(run / "step-00000012") == expected
    # another folder begins from it
    branch = tmp_path / "branch" / "run"
    assert pretrain.run(make_recipe(data, branch, checkpoint__resume=str(straight / "step-00000008"))) == 0
    assert fingerprints(branch / "step-00000012") == expected
    assert [record["step"] for record in metrics(branch)] == [9, 10, 11, 12]
    with pytest.raises(MlmError, match="another recipe"):
        pretrain.run(make_recipe(data, tmp_path / "other", seed=1, checkpoint__resume=str(straight / "step-00000008")))


def test_begins_from_a_models_weights(straight: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert pretrain.run(make_recipe(data, run, init_from=str(straight), train__steps=2)) == 0
    assert losses(run)[0] < losses(straight)[0]
    with pytest.raises(UsageError, match=r"model\.hidden_size: 32 there, 64 in the recipe"):
        pretrain.run(make_recipe(data, tmp_path / "no", init_from=str(straight), model__hidden_size=64))


def test_workers_and_masked_documents_change_no_sample(data: Path, tmp_path: Path) -> None:
    """Loader processes give the same batches; masking goes through the whole path."""
    for workers in (0, 2):
        changes = {"data__num_workers": workers, "data__mask_documents": True, "train__steps": 3}
        assert pretrain.run(make_recipe(data, tmp_path / str(workers), **changes)) == 0
    assert losses(tmp_path / "0") == losses(tmp_path / "2")
