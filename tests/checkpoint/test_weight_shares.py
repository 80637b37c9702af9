"""Ranks that share the writing of a model: who writes what, and that the files together are the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.shared_writing import save_together, write_together
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mlm_cli.checkpoint import weight_shares
from mlm_cli.checkpoint.folder import RunFolder
from mlm_cli.checkpoint.hub import load_model_folder, save_model_folder
from mlm_cli.checkpoint.load import find_newest
from mlm_cli.checkpoint.manifest import list_files, read_manifest
from mlm_cli.checkpoint.weight_shares import Job, share_out
from mlm_cli.config.schema import ModelSection
from mlm_cli.errors import CheckpointError
from mlm_cli.models.registry import build_model
from mlm_cli.parallel.context import SOLO, Group, ParallelContext

SIZE = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "vocab_size": 90}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt": SIZE,
    "llama": {
        **SIZE, "position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "tie_embeddings": False,
        "num_query_groups": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / request.param
    save_model_folder(build_model(ModelSection(**FAMILIES[request.param]), ParallelContext.single(), seed=2), folder)
    return folder


def job(name: str, size: int) -> Job:
    return Job({name: size}, dict)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    found: dict[str, torch.Tensor] = {}
    for path in files:
        tensors = load_file(path)
        assert not found.keys() & tensors.keys(), "written twice"
        found |= tensors
    if len(files) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: path.name for path in files for name in load_file(path)}
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in found.values())
    else:
        assert files[0].name == "model.safetensors" and not (folder / "model.safetensors.index.json").exists()
    return found


def check_same(folder: Path, source: Path) -> None:
    ours, theirs = tensors_of(folder), tensors_of(source)
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    load_model_folder(folder, ParallelContext.single())


@pytest.mark.parametrize(
    ("layout", "smallest", "files"),
    [
        ({"tensor": 2}, 8192, [1, 1]),
        ({"pipeline": 2}, 8192, [1, 1]),
        ({"tensor": 2}, 1 << 20, [1, 0]),  # too small to be shared
        ({"pipeline": 2}, 1 << 20, [1, 0]),
        pytest.param({"tensor": 2, "pipeline": 2}, 8192, [1, 1, 1, 1], marks=pytest.mark.slow),
        pytest.param({"tensor": 2}, 8192, [1, 1, 0, 0], marks=pytest.mark.slow),  # the other two hold the same
    ],
)
def test_the_files_of_all_ranks_are_the_model(
    layout: dict[str, int], smallest: int, files: list[int], source: Path, tmp_path: Path, run_ranks: Any
) -> None:
    place = tmp_path / "out"
    written = run_ranks(write_together, len(files), str(source), str(place), layout, smallest, 1 << 30)
    assert sorted(map(len, written), reverse=True) == sorted(files, reverse=True)
    for folder in (place, tmp_path / "out.later"):
        assert sorted(name for names in written for name in names) == sorted(
            p.name for p in folder.glob("*.safetensors")
        )
        check_same(folder, source)


def test_no_file_is_larger_than_asked(source: Path, tmp_path: Path, run_ranks: Any) -> None:
    written = run_ranks(write_together, 2, str(source), str(tmp_path / "out"), {"tensor": 2}, 8192, 40_000)
    assert all(len(names) > 1 for names in written)
    check_same(tmp_path / "out", source)
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert sum(t.numel() * t.element_size() for t in load_file(path).values()) <= 40_000


@pytest.mark.parametrize("background", [False, True])
def test_a_checkpoint_knows_the_files_of_all_ranks(
    background: bool, source: Path, tmp_path: Path, run_ranks: Any
) -> None:
    written = run_ranks(save_together, 2, str(source), str(tmp_path / "run"), background)
    assert [len(names) for names in written] == [1, 1]
    folder = tmp_path / "run" / "step-00000003"
    manifest = read_manifest(folder)
    assert sorted(manifest.files) == list_files(folder)
    assert {f"model/{name}" for names in written for name in names} < manifest.files.keys()
    check_same(folder / "model", source)
    found = find_newest(RunFolder(tmp_path / "run"))  # which compares every hash
    assert found is not None and found.manifest.step == 3
    path = folder / "model" / written[1][0]
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors has another sha256"):
        find_newest(RunFolder(tmp_path / "run"))


@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=40),
    writers=st.integers(1, 9),
    most=st.integers(50, 5000),
    smallest=st.integers(1, 300),
)
def test_every_job_is_in_one_file_and_in_order(sizes: list[int], writers: int, most: int, smallest: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_shares, "_SMALLEST_SHARE", smallest)
        parts = weight_shares._split(sizes, writers, most)
    assert [place for part in parts for place in part] == list(range(len(sizes)))
    for part in parts:
        assert len(part) == 1 or sum(sizes[place] for place in part) <= most
    assert all(len(part) for part in parts)


def test_shares_are_of_about_equal_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT of 24 layers: a large embedding first, then equal layers; eight ranks."""
    monkeypatch.setattr(weight_shares, "_SMALLEST_SHARE", 10)
    sizes = [51, *[12] * 24]
    parts = weight_shares._split(sizes, 8, 1 << 30)
    assert len(parts) <= 8 and max(sum(sizes[place] for place in part) for part in parts) <= 60
    monkeypatch.setattr(weight_shares, "_SMALLEST_SHARE", 100)
    assert len(weight_shares._split(sizes, 8, 1 << 30)) == 3


def test_names_count_all_files() -> None:
    jobs = [job("a", 10), job("b", 10), job("c", 25)]
    shares = share_out(jobs, SOLO, SOLO, 20)
    assert shares.places == {
        "a": "model-00001-of-00002.safetensors", "b": "model-00001-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
    }  # fmt: skip
    assert shares.num_bytes == 45 and all(file.mine for file in shares.files)
    assert isinstance(SOLO, Group)
    assert share_out(jobs, SOLO, SOLO, 99).places["c"] == "model.safetensors"
