"""Our one-pass writer makes files that the safetensors library reads, and hashes what it wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mlm_cli.checkpoint.manifest import hash_file
from mlm_cli.checkpoint.tensor_file import write_tensors


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
