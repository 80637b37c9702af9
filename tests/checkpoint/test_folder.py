"""The run folder: one writer at a time, names that appear whole, nothing removed too early."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mlm_cli.checkpoint.folder import RunFolder, check_free_space, write_atomic
from mlm_cli.errors import ResourceError, UsageError

HOLD = """
import sys, time
from mlm_cli.checkpoint.folder import RunFolder
with RunFolder(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=rf"in use by process {holder.pid} on "), run.lock():
            pass
    finally:
        holder.kill()
        holder.wait()
    with run.lock():  # killed without a chance to tidy up: the lock died with it
        pass


def test_the_same_process_cannot_hold_it_twice(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with run.lock():
        with pytest.raises(UsageError, match="in use by this very process"), run.lock():
            pass
        # ... and the refusal did not let go of the lock
        probe = subprocess.run([sys.executable, "-c", HOLD, str(run)], capture_output=True, text=True)
        assert f"process {os.getpid()}" in probe.stderr
    with run.lock():
        pass


def test_a_folder_that_cannot_be_made_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UsageError, match="cannot write to the output folder"),
        RunFolder(tmp_path / "file" / "run").lock(),
    ):
        pass


def test_atomic_writes_leave_no_scratch_and_never_half_a_file(tmp_path: Path) -> None:
    target = tmp_path / "status.json"
    write_atomic(target, "old")
    begin = time.monotonic()
    while time.monotonic() - begin < 0.1:
        write_atomic(target, "new" * 100, durable=False)
        assert target.read_text() == "new" * 100
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_keeps_the_newest_and_sees_only_whole_checkpoints(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in (10, 20, 100_000_000, 30):
        (run.checkpoint(step) / "model").mkdir(parents=True)
    run.temporary(40).mkdir()
    (tmp_path / "step-x").mkdir()
    assert run.steps() == [10, 20, 30, 100_000_000]
    run.prune(2, 100_000_000)
    assert run.steps() == [30, 100_000_000]
    run.finish_removals()
    assert not list(tmp_path.glob(".trash*"))
    run.prune(0, 100_000_000)
    assert run.steps() == [30, 100_000_000]
    run.set_latest(30)
    assert (tmp_path / "latest").read_text() == "step-00000030\n"
    run.remove_leftovers()
    assert not run.temporary(40).exists()


def test_free_space_is_counted_before_it_is_used(tmp_path: Path) -> None:
    check_free_space(tmp_path, 1, "a file")
    with pytest.raises(ResourceError, match=r"needs 1000000\.00 GB but only"):
        check_free_space(tmp_path, 10**15, "a checkpoint")


def test_training_does_not_wait_for_deletions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is pruned has lost its name at once; who needs the space or the lock waits for the disk's work."""
    run, go, remove = RunFolder(tmp_path), threading.Event(), shutil.rmtree

    def slow(folder: Path, **options: bool) -> None:
        if folder.exists():
            assert go.wait(timeout=20)
        remove(folder, **options)

    for step in (1, 2, 3):
        (run.checkpoint(step) / "model").mkdir(parents=True)
    monkeypatch.setattr(shutil, "rmtree", slow)
    with run.lock():
        run.prune(1, 3)
        assert run.steps() == [3] and len(list(tmp_path.glob(".trash*"))) == 2
        go.set()
    assert not list(tmp_path.glob(".trash*"))
