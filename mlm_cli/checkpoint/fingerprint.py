"""Which weights these are: a name for them that anyone who has the files can work out again."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mlm_cli.checkpoint.manifest import MANIFEST, hash_file, read_manifest


def weights_fingerprint(model: Path) -> tuple[str, int | None]:
    """SHA-256 of what ``sha256sum *.safetensors`` says in a model folder, and its step where it is of a checkpoint.

    The manifest of a checkpoint knows the hashes (``check_weights`` compares them with the files); else the files are
    read. A folder without safetensors (Megatron-LM's) counts with all its files.

    Raises:
        CheckpointError: a manifest that cannot be read.
    """
    names = sorted(path.name for path in model.glob("*.safetensors"))
    names = names or sorted(path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file())
    manifest = read_manifest(model.parent) if model.name == "model" and (model.parent / MANIFEST).is_file() else None
    known = {} if manifest is None else manifest.files
    records = {name: known.get(f"model/{name}") or hash_file(model / name) for name in names}
    listed = "".join(f"{record.sha256}  {name}\n" for name, record in records.items())
    return hashlib.sha256(listed.encode()).hexdigest(), None if manifest is None else manifest.step
