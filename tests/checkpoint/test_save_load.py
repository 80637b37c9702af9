"""Saving and finding checkpoints: whole or absent, damage noticed, any layout to any layout."""

from __future__ import annotations

import errno
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_engines import make_checkpointer, make_engine, take_steps

from mlm_cli.checkpoint import save, tensor_file
from mlm_cli.checkpoint.folder import RunFolder
from mlm_cli.checkpoint.load import find_newest, load_state
from mlm_cli.checkpoint.manifest import read_manifest
from mlm_cli.checkpoint.state import Position
from mlm_cli.errors import CheckpointError, ResourceError
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.random import RandomStreams

ONE = ParallelContext.single()


def saved(folder: Path, *steps: int, keep_last: int = 0) -> RunFolder:
    engine = make_engine(ONE)
    checkpointer = make_checkpointer(folder, engine, ONE, keep_last=keep_last)
    for step in steps:
        take_steps(engine, engine.updates + 1, step)
        checkpointer.save(Position(step, step * 6, {"best": 0.5}))
    return checkpointer.run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_goes_on_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    straight = make_engine(ONE, dtype)
    expected = take_steps(straight, 1, 6)

    first = make_engine(ONE, dtype)
    begun = take_steps(first, 1, 3)
    make_checkpointer(tmp_path, first, ONE).save(Position(3, 18, {"best": 0.5}))
    again = make_engine(ONE, dtype)
    found = find_newest(RunFolder(tmp_path))
    assert found is not None
    assert load_state(found, again, None, ONE) == Position(3, 18, {"best": 0.5})
    assert begun + take_steps(again, 4, 6) == expected
    for one, two in zip(straight.fragments(), again.fragments(), strict=True):
        assert all(torch.equal(one.tensors[kind], two.tensors[kind]) for kind in one.tensors)


def test_random_generators_go_on_where_they_were(tmp_path: Path) -> None:
    def draw(streams: RandomStreams) -> list[float]:
        with streams.sliced():
            inside = float(torch.rand(()))
        return [inside, float(torch.rand(())), random.random(), random.gauss(0, 1), float(np.random.randn())]

    streams = RandomStreams(ONE, 3)
    draw(streams)
    engine = make_engine(ONE)
    checkpointer = make_checkpointer(tmp_path, engine, ONE, streams=streams)
    checkpointer.save(Position(1, 1))
    expected = [draw(streams) for _ in range(3)]
    found = find_newest(RunFolder(tmp_path))
    assert found is not None
    other = RandomStreams(ONE, 4)
    load_state(found, engine, other, ONE)
    assert [draw(other) for _ in range(3)] == expected


def test_falls_back_over_damage_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = saved(tmp_path, 1, 2, 3, 4)
    with (run.checkpoint(4) / "state/rank-00000.safetensors").open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))
    (run.checkpoint(3) / "model/config.json").unlink()
    (run.checkpoint(2) / "manifest.json").write_text("{")
    found = find_newest(run)
    assert found is not None and found.folder == run.checkpoint(1)
    said = capsys.readouterr().err
    assert "step-00000004: state/rank-00000.safetensors has another sha256" in said
    assert "step-00000003: model/config.json is missing" in said
    assert "falling back to step-00000001" in said


def test_nothing_sound_is_an_error_that_lists_each_with_its_reason(tmp_path: Path) -> None:
    run = saved(tmp_path, 1, 2)
    for step in (1, 2):
        path = run.checkpoint(step) / "state/rank-00000.safetensors"
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="no checkpoint") as caught:
        find_newest(run)
    assert "step-00000001: state" in caught.value.message and "step-00000002: state" in caught.value.message
    assert "has 100 bytes instead of" in caught.value.message


def test_an_empty_folder_is_no_error(tmp_path: Path) -> None:
    assert find_newest(RunFolder(tmp_path)) is None
    assert find_newest(RunFolder(tmp_path / "not there")) is None


def test_keeps_the_last_and_points_at_the_newest(tmp_path: Path) -> None:
    run = saved(tmp_path, 1, 2, 3, keep_last=2)
    assert run.steps() == [2, 3]
    assert (tmp_path / "latest").read_text().strip() == "step-00000003"
    manifest = read_manifest(run.checkpoint(3))
    assert (manifest.step, manifest.consumed_samples, manifest.data_fingerprint) == (3, 18, "data")
    assert set(manifest.files) == {"model/config.json", "state/rank-00000.safetensors"}


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    run = saved(tmp_path, 1, 2)
    (run.checkpoint(2) / "manifest.json").unlink()
    saved(tmp_path, 2)
    found = find_newest(run)
    assert found is not None and found.folder == run.checkpoint(2)


@pytest.mark.parametrize("where", ["state", "model", "manifest"])
def test_disk_full_leaves_the_previous_checkpoint_and_no_remains(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(ONE)
    checkpointer = make_checkpointer(tmp_path, engine, ONE)
    checkpointer.save(Position(1, 6))
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise full

    if where == "state":
        monkeypatch.setattr(tensor_file.os, "fsync", fail)
    elif where == "model":
        checkpointer.write_model = fail
    else:
        monkeypatch.setattr(save.Manifest, "to_json", fail)
    with pytest.raises(ResourceError, match="disk full while writing"):
        checkpointer.save(Position(2, 12))
    monkeypatch.undo()
    found = find_newest(RunFolder(tmp_path))
    assert found is not None and found.manifest.step == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]


def test_a_really_full_disk(tmp_path: Path) -> None:
    """On a small file system of its own, where the tests may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=96k tmpfs {folder} 2>/dev/null") != 0:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        engine = make_engine(ONE)
        checkpointer = make_checkpointer(folder, engine, ONE)
        checkpointer.bytes_needed = lambda: 0  # type: ignore[method-assign] # as if others fill the disk meanwhile
        with pytest.raises(ResourceError, match="disk full"):
            for step in range(1, 40):
                checkpointer.save(Position(step, step))
        found = find_newest(RunFolder(folder))
        assert found is not None and not list(folder.glob(".tmp*"))
        with pytest.raises(ResourceError, match="GB are free"):
            del checkpointer.bytes_needed  # type: ignore[method-assign]
            checkpointer.check_space(1)
    finally:
        os.system(f"umount {folder}")


def _save_on(rank: int, size: int, folder: str, tensor: int) -> list[float]:
    parallel = ParallelContext.create(tensor=tensor)
    engine = make_engine(parallel)
    losses = take_steps(engine, 1, 3)
    make_checkpointer(Path(folder), engine, parallel).save(Position(3, 18))
    return losses + take_steps(engine, 4, 6)


def _resume_on(rank: int, size: int, folder: str, tensor: int) -> list[float]:
    parallel = ParallelContext.create(tensor=tensor)
    engine = make_engine(parallel)
    found = find_newest(RunFolder(folder))
    assert found is not None
    load_state(found, engine, None, parallel)
    return take_steps(engine, 4, 6)


def test_any_tensor_size_to_any_other(tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    straight = take_steps(make_engine(ONE), 1, 6)
    (sliced, _) = run_ranks(_save_on, 2, str(tmp_path / "sliced"), 2)
    assert sliced == pytest.approx(straight, rel=1e-5)
    assert _resume_on(0, 1, str(tmp_path / "sliced"), 1) == pytest.approx(straight[3:], rel=1e-5)

    engine = make_engine(ONE)
    take_steps(engine, 1, 3)
    make_checkpointer(tmp_path / "whole", engine, ONE).save(Position(3, 18))
    (resumed, _) = run_ranks(_resume_on, 2, str(tmp_path / "whole"), 2)
    assert resumed == pytest.approx(straight[3:], rel=1e-5)


def _one_rank_fails(rank: int, size: int, folder: str) -> str:
    parallel = ParallelContext.create(tensor=2)
    checkpointer = make_checkpointer(Path(folder), make_engine(parallel), parallel)
    checkpointer.save(Position(1, 1))
    if rank == 1:

        def fail(*args: Any) -> Any:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

        tensor_file.os.fsync = fail  # type: ignore[assignment]
    try:
        checkpointer.save(Position(2, 2))
    except ResourceError as error:
        return error.message
    return "saved"


def test_what_fails_on_one_rank_fails_on_all(tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    said = run_ranks(_one_rank_fails, 2, str(tmp_path))
    assert said[0] == said[1] and "disk full while writing" in said[0] and "rank-00001" in said[0]
    assert RunFolder(tmp_path).steps() == [1]
    assert not list(tmp_path.glob(".tmp*"))


def test_keeps_the_best_beside_the_last(tmp_path: Path) -> None:
    engine = make_engine(ParallelContext.single())
    checkpointer = make_checkpointer(tmp_path, engine, ParallelContext.single(), keep_last=1, keep_best=2)
    stays = []
    for step, loss in enumerate([3.0, 2.0, 2.5, 2.0, None, 1.0, 4.0], start=1):
        checkpointer.save(Position(step, step), {} if loss is None else {"valid_loss": loss})
        stays.append(checkpointer.run.steps())
    assert stays == [[1], [1, 2], [2, 3], [2, 4], [2, 4, 5], [2, 6], [2, 6, 7]]


def test_a_damaged_checkpoint_takes_no_sound_ones_place(tmp_path: Path) -> None:
    """A run that fell back saves at an earlier step than the damaged one, which must not count as the newest."""
    engine = make_engine(ONE)
    checkpointer = make_checkpointer(tmp_path, engine, ONE, keep_last=1, keep_best=1)
    for step, loss in ((10, 1.0), (30, 2.0)):
        checkpointer.save(Position(step, step), {"valid_loss": loss})
    path = checkpointer.run.checkpoint(30) / "state/rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    for step in (12, 14):
        saved = checkpointer.save(Position(step, step), {"valid_loss": math.nan})  # which is nobody's best
        assert saved is not None and saved.folder.is_dir()
        assert checkpointer.run.steps() == [10, step, 30]
        found = find_newest(checkpointer.run)
        assert found is not None and found.manifest.step == step
    checkpointer.save(Position(30, 30))
    assert checkpointer.run.steps() == [10, 30]


def test_a_flipped_bit_of_the_manifest_is_damage_too(tmp_path: Path) -> None:
    """Whatever it says then: another layout, another step."""
    run = saved(tmp_path, 1, 2)
    path = run.checkpoint(2) / "manifest.json"
    written = path.read_bytes()
    for before, after in ((b'"world": 1', b'"world": 3'), (b'"step": 2', b'"step": 6'), (b'"data": 1', b'"data": 0')):
        path.write_bytes(written.replace(before, after))
        found = find_newest(run)
        assert found is not None and found.folder == run.checkpoint(1), after
    path.write_bytes(written)
    found = find_newest(run)
    assert found is not None and found.folder == run.checkpoint(2)
