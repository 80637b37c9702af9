"""The name of weights: what ``sha256sum`` says, from the files or from the manifest beside them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from mlm_cli.checkpoint.fingerprint import weights_fingerprint
from mlm_cli.checkpoint.manifest import MANIFEST, FileRecord, Manifest, hash_file


def test_it_is_what_sha256sum_says(tmp_path: Path) -> None:
    model = tmp_path / "step-00000007" / "model"
    model.mkdir(parents=True)
    for name in ("model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors", "config.json"):
        (model / name).write_text(name)
    by_hand = "LC_ALL=C; sha256sum *.safetensors | sha256sum"
    said = subprocess.run(["sh", "-c", by_hand], cwd=model, check=True, capture_output=True, text=True).stdout.split()[
        0
    ]
    assert weights_fingerprint(model) == (said, None)
    records = {f"model/{file.name}": hash_file(file) for file in model.iterdir()}
    manifest = Manifest(7, 56, "hash", None, {}, records)
    (model.parent / MANIFEST).write_text(manifest.to_json())
    assert weights_fingerprint(model) == (said, 7)
    # The manifest is asked, not the files: those were compared with it when the model was read.
    records["model/model-00001-of-00002.safetensors"] = FileRecord(1, "0" * 64)
    (model.parent / MANIFEST).write_text(manifest.to_json())
    assert weights_fingerprint(model)[0] != said


def test_a_folder_of_another_kind_counts_whole(tmp_path: Path) -> None:
    (tmp_path / "mp_rank_00").mkdir()
    weights = tmp_path / "mp_rank_00" / "model_optim_rng.pt"
    weights.write_text("a")
    first = weights_fingerprint(tmp_path)
    weights.write_text("b")
    assert weights_fingerprint(tmp_path) != first and first[1] is None
