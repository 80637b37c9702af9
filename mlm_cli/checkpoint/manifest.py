"""``manifest.json``: sizes and SHA-256 of every file of a checkpoint, and where in training it was taken."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mlm_cli import heartbeat
from mlm_cli.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_CHUNK = 1 << 20  # bytes hashed at once
_OWN_HASH = "sha256"


@dataclass(frozen=True)
class FileRecord:
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
        step: optimizer updates taken.
        consumed_samples: samples of the training data already seen; the next one is sample number ``consumed_samples``.
        recipe_hash: of the recipe's parts that make a run what it is (``training.session``).
        data_fingerprint: of the training data.
        layout: ranks it was written by, ``{"world": 2, "tensor": 2, "data": 1, ...}``.
        files: path inside the checkpoint -> size and SHA-256.
        versions: of this tool and the libraries beside it.
    """

    step: int
    consumed_samples: int
    recipe_hash: str
    data_fingerprint: str | None
    layout: dict[str, int]
    files: dict[str, FileRecord]
    versions: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """With a hash of itself: a flipped bit could name another layout or step, and still be JSON."""
        values = asdict(self)
        return json.dumps({**values, _OWN_HASH: _hash_of(values)}, indent=1, sort_keys=True) + "\n"


def _hash_of(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> FileRecord:
    """Size and SHA-256 of a file, read in one pass."""
    with path.open("rb", buffering=0) as file:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
            heartbeat.beat()
        return FileRecord(os.fstat(file.fileno()).st_size, digest.hexdigest())


def list_files(folder: Path) -> list[str]:
    """All files below a checkpoint but the manifest itself, as sorted POSIX paths."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises:
        CheckpointError: none there, not JSON, of a newer version, lacking a key, or changed since it was written.
    """
    path = folder / MANIFEST
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} does not read as JSON ({error})") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("files"), dict):
        raise CheckpointError(f"{path} is not a manifest")
    if raw.get("version", 0) > FORMAT_VERSION:
        raise CheckpointError(f"{path} has version {raw['version']}; this mlm reads up to {FORMAT_VERSION}")
    if (own := raw.pop(_OWN_HASH, None)) is not None and own != _hash_of(raw):  # older ones have none
        raise CheckpointError(f"{path} has another sha256 than when it was written")
    try:
        files = {name: FileRecord(int(entry["size"]), str(entry["sha256"])) for name, entry in raw.pop("files").items()}
        return Manifest(files=files, **raw)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a manifest ({error})") from None


def find_damage(folder: Path, manifest: Manifest, *, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the files of a checkpoint, one line each; empty when all is well.

    Sizes are looked at for all files, hashes for every ``parts``-th file from ``part`` on: ranks share the work.
    """
    damage = []
    sound = []
    for name, record in sorted(manifest.files.items()):
        try:
            size = (folder / name).stat().st_size
        except OSError:
            damage.append(f"{name} is missing")
            continue
        if size != record.size:
            damage.append(f"{name} has {size:,} bytes instead of {record.size:,}")
        else:
            sound.append(name)
    # Largest first, dealt round robin: no rank is left with all the big ones.
    sound.sort(key=lambda name: (-manifest.files[name].size, name))
    for name in sound[part::parts]:
        try:
            found = hash_file(folder / name).sha256
        except OSError as error:
            damage.append(f"{name} cannot be read ({error.strerror})")
            continue
        if found != manifest.files[name].sha256:
            damage.append(f"{name} has another sha256 than when it was written")
    return damage


def check_weights(model: Path) -> None:
    """Compare the weights in ``model/`` of a checkpoint with the manifest beside it, where there is one.

    The texts there (its card, a ``config.json``) are the user's to edit.

    Raises:
        CheckpointError: a file is missing or not what was written.
    """
    if model.name != "model" or not (model.parent / MANIFEST).is_file():
        return
    manifest = read_manifest(model.parent)
    files = {name: record for name, record in manifest.files.items() if re.fullmatch(r"model/.*\.safetensors", name)}
    damage = find_damage(model.parent, replace(manifest, files=files))
    if damage:
        raise CheckpointError(
            f"{model.parent} is damaged: {'; '.join(damage)}", hint="use an earlier checkpoint, or a copy of this one"
        )
