"""What a user may call MODEL: a run folder, a checkpoint folder, an exported folder, Megatron-LM's, or a Hub name."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mlm_cli import log
from mlm_cli.checkpoint.megatron_folder import is_megatron_folder
from mlm_cli.errors import CheckpointError

_HUB_NAME = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_STEP = re.compile(r"^step-\d+$")


def resolve_model(spec: str | os.PathLike[str]) -> Path:
    """The folder with ``config.json`` and weights that ``spec`` means.

    Args:
        spec: a run folder (its latest checkpoint), a checkpoint folder (its ``model/``), a folder in Hugging Face
            layout, a checkpoint of Megatron-LM in its classic layout (or one iteration of it), or the name of a model
            on the Hub (downloaded unless ``HF_HUB_OFFLINE`` is set).

    Raises:
        CheckpointError: there is no such model.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.exists():
        raise CheckpointError(f"{path} is a file", hint="name the folder that holds config.json")
    name = os.fspath(spec)
    if not _HUB_NAME.match(name) or name.startswith("."):
        raise CheckpointError(f"no model folder {path}")
    return _download(name)


def resolve_best(spec: str) -> Path:
    """As ``resolve_model``, but of a fine-tuned run its best checkpoint, not its latest."""
    best = Path(spec).expanduser() / "best"
    if best.is_file():
        name = best.read_text(encoding="utf-8").strip()
        if (best.parent / name / "model" / "config.json").is_file():
            log.info(f"taking {name}, the best checkpoint of {spec}")
            return best.parent / name / "model"
        log.warn(f"{best} names {name}, which is not there: taking the latest checkpoint")
    return resolve_model(spec)


def _in_folder(path: Path) -> Path:
    latest = path / "latest"
    if (path / "config.json").is_file():
        return path
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if is_megatron_folder(path):
        return path
    pointed = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else None
    if pointed is not None and _STEP.match(pointed) and (path / pointed / "model" / "config.json").is_file():
        return path / pointed / "model"
    # A run that was stopped between its first checkpoint and the pointer to it, or whose pointer was damaged since.
    whole = sorted(found.parent for found in path.glob("step-*/manifest.json"))
    whole = [folder for folder in whole if _STEP.match(folder.name) and (folder / "model" / "config.json").is_file()]
    if whole:
        if pointed is not None:
            log.warn(f"{latest} {_what_is_wrong(pointed)}: taking {whole[-1].name}, the newest complete checkpoint")
        return whole[-1] / "model"
    if pointed is not None:
        raise CheckpointError(
            f"{latest} {_what_is_wrong(pointed)}, and no other checkpoint of {path} is complete",
            hint="name another run, or a folder that holds config.json",
        )
    raise CheckpointError(
        f"{path} holds no model: neither config.json, nor model/, nor a checkpoint",
        hint="name a run folder with a checkpoint, a checkpoint folder, a Hugging Face folder or one of Megatron-LM",
    )


def _what_is_wrong(pointed: str) -> str:
    if not _STEP.match(pointed):
        return f"names no checkpoint ({pointed[:80]!r})" if pointed else "is empty"
    return f"names {pointed}, which holds no model/config.json"


def _download(name: str) -> Path:
    """A model of the Hub, from the local cache where it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"`{name}` is no folder here and cannot be had from the Hub: {reason}",
            hint="check the path or name; private models need `hf auth login`",
        ) from None
