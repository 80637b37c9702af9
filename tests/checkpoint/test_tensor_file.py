"""Our one-pass writer makes files that the safetensors library reads, and hashes what it wrote."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mlm_cli.checkpoint import tensor_file
from mlm_cli.checkpoint.manifest import hash_file
from mlm_cli.checkpoint.tensor_file import write_tensors
from mlm_cli.errors import CheckpointError


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]
)
def test_the_library_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "t.safetensors"
    tensors = {
        "b": (torch.arange(24).view(2, 3, 4) % 7).to(dtype),
        "a": torch.ones(5, 3).t().to(dtype),  # not contiguous
        "empty": torch.empty(0, dtype=dtype),
    }
    record = write_tensors(path, tensors, {"format": "pt"})
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, "pt") as handle:
        assert handle.metadata() == {"format": "pt"}
    assert record == hash_file(path)


def test_equal_contents_give_equal_bytes(tmp_path: Path) -> None:
    one, two = {"x": torch.ones(3), "y": torch.zeros(2)}, {"y": torch.zeros(2), "x": torch.ones(3)}
    first = write_tensors(tmp_path / "1", one, {"a": "1", "b": "2"})
    second = write_tensors(tmp_path / "2", two, {"b": "2", "a": "1"})
    assert first == second


def test_what_reads_back_differently_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit flips behind our back, anywhere: in the first chunk, across chunks, in the odd bytes at the end."""
    monkeypatch.setattr(tensor_file, "_CHUNK", 64)
    tensors = {"x": torch.arange(203, dtype=torch.uint8)}
    size = write_tensors(tmp_path / "good", tensors, {}).size
    compare = tensor_file._compare
    for place in (0, 9, size - 203, size - 100, size - 1):

        def flipping(descriptor: int, start: int, chunk: memoryview[int], *rest: Any, place: int = place) -> None:
            if start <= place < start + len(chunk):
                byte = os.pread(descriptor, 1, place)
                os.pwrite(descriptor, bytes([byte[0] ^ 4]), place)
            compare(descriptor, start, chunk, *rest)

        monkeypatch.setattr(tensor_file, "_compare", flipping)
        with pytest.raises(CheckpointError, match="reads back differently"):
            write_tensors(tmp_path / "bad", tensors, {})


def test_a_flush_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk may take the bytes and say only when they are to be durable that it is full."""

    def full(_number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_file, "_make_durable", full)
    with pytest.raises(OSError, match="No space left") as failure:
        write_tensors(tmp_path / "t", {"x": torch.ones(1000)}, {})
    assert failure.value.errno == errno.ENOSPC
