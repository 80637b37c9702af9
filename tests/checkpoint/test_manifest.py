"""A manifest finds every kind of damage, and says which file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from mlm_cli.checkpoint.manifest import Manifest, find_damage, hash_file, list_files, read_manifest
from mlm_cli.errors import CheckpointError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "rank-00000.safetensors").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "config.json").write_text("{}")
    files = {name: hash_file(tmp_path / name) for name in list_files(tmp_path)}
    manifest = Manifest(7, 28, "recipe", "data", {"world": 1}, files, {"mlm": "0"}, {"loss": 2.5})
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    return tmp_path


def test_reads_back_what_was_written(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    assert (manifest.step, manifest.consumed_samples, manifest.metrics) == (7, 28, {"loss": 2.5})
    expected = hashlib.sha256(bytes(range(256)) * 40).hexdigest()
    assert manifest.files["state/rank-00000.safetensors"].sha256 == expected
    assert find_damage(checkpoint, manifest) == []


def test_names_the_damaged_file(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    weights = checkpoint / "state" / "rank-00000.safetensors"
    good = weights.read_bytes()

    weights.write_bytes(good[:5000] + bytes([good[5000] ^ 1]) + good[5001:])
    assert "rank-00000.safetensors has another sha256" in find_damage(checkpoint, manifest)[0]
    weights.write_bytes(good[:-1])
    assert "10,239 bytes instead of 10,240" in find_damage(checkpoint, manifest)[0]
    weights.unlink()
    assert "is missing" in find_damage(checkpoint, manifest)[0]


def test_ranks_share_the_hashing_and_together_see_everything(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    for name in manifest.files:
        path = checkpoint / name
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    shares = [find_damage(checkpoint, manifest, part=part, parts=2) for part in range(2)]
    assert all(len(share) == 1 for share in shares) and shares[0] != shares[1]


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"files": {"a": {}}}), json.dumps({"files": {}})])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_a_newer_format_is_refused(checkpoint: Path) -> None:
    values = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps({**values, "version": 99}))
    with pytest.raises(CheckpointError, match="version 99"):
        read_manifest(checkpoint)


def test_one_without_a_hash_of_itself_is_read(checkpoint: Path) -> None:
    """As older versions wrote it."""
    values = json.loads((checkpoint / "manifest.json").read_text())
    del values["sha256"]
    (checkpoint / "manifest.json").write_text(json.dumps(values))
    assert read_manifest(checkpoint).step == 7
