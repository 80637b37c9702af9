"""``PREFIX.json`` beside an indexed data set: how it was made, from what, and with which tokenizer."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlm_cli.data.indexed import resolve_prefix
from mlm_cli.errors import DataError

FORMAT = "mlm-indexed-1"


@dataclass
class Sidecar:
    """What ``PREFIX.json`` says. Pretraining refuses data whose ``tokenizer_fingerprint`` is not its tokenizer's.

    ``sources``: one entry per input with ``path, bytes, sha256, documents, ...``. ``outputs``: per pair ``key, level,
    prefix (relative), documents, sequences, tokens, max_token_id, dtype``. ``origins``: name of a ``.npy`` beside the
    sidecar, one record ``(source u32, line u64)`` per document. ``filters``: name, settings and what each removed.
    ``bad_lines``: count and the first ones; all of them are in the file named there.
    """

    tokenizer_fingerprint: str
    tokenizer_spec: str
    vocab_size: int
    eod_id: int | None
    append_eod: bool
    documents: int
    outputs: list[dict[str, Any]]
    sources: list[dict[str, Any]] = field(default_factory=list)
    origins: str | None = None
    filters: list[dict[str, Any]] = field(default_factory=list)
    bad_lines: dict[str, Any] = field(default_factory=dict)
    made_by: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    format: str = FORMAT

    def text(self) -> str:
        """The content of the file."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    def output(self, prefix: str | os.PathLike[str]) -> dict[str, Any] | None:
        """The entry of the pair with this prefix."""
        name = Path(prefix).name
        return next((entry for entry in self.outputs if entry["prefix"] == name), None)


def sidecar_path(prefix: str | os.PathLike[str]) -> Path:
    """Where the sidecar of a pair lies: ``PREFIX.json``, without the ``_text_document`` of the pair's own prefix."""
    text = os.fspath(prefix)
    if not Path(text + ".json").exists():
        text = resolve_prefix(text)
    for level in ("_document", "_sentence"):
        if text.endswith(level):
            base = text.removesuffix(level)
            # the key itself may contain underscores, so the longest prefix that has a sidecar wins
            while "_" in Path(base).name:
                base = base.rpartition("_")[0]
                if Path(base + ".json").exists():
                    return Path(base + ".json")
    return Path(text + ".json")


def read_sidecar(path: str | os.PathLike[str]) -> Sidecar:
    """Read one sidecar file.

    Raises:
        DataError: unreadable, or not a sidecar.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        known = {key: content[key] for key in Sidecar.__dataclass_fields__ if key in content}
        return Sidecar(**known)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"`{path}` is not a data sidecar: {error}", hint="run `mlm preprocess` again") from error


def load_sidecar(prefix: str | os.PathLike[str]) -> Sidecar | None:
    """The sidecar of a pair, or None where there is none (data made by other tools)."""
    path = sidecar_path(prefix)
    return read_sidecar(path) if path.exists() else None
