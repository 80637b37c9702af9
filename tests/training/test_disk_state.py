"""Optimizer state in mapped files: the values, what is left behind, and a disk that is too small."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from mlm_cli.training.disk_state import DiskState


def test_tensors_are_mapped_from_files_without_names(tmp_path: Path) -> None:
    disk = DiskState(tmp_path / "new" / "state")
    values = torch.randn(10_000)
    kept, zeros = disk.copy_of(values), disk.zeros(7)
    assert torch.equal(kept, values) and torch.equal(zeros, torch.zeros(7))
    kept.mul_(2)
    zeros.add_(1)
    assert torch.equal(kept, values * 2) and torch.equal(zeros, torch.ones(7))
    assert disk.zeros(0).shape == (0,)
    assert list((tmp_path / "new" / "state").iterdir()) == []
    mapped = Path("/proc/self/maps").read_text()
    assert mapped.count(str(tmp_path / "new" / "state")) >= 2  # " (deleted)" files of ours


def test_a_disk_that_is_too_small_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        DiskState(tmp_path).zeros(2**52)
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG) and caught.value.filename == str(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        DiskState(tmp_path / "file" / "state")
