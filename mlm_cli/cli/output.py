"""What goes to stdout: data, and nothing else."""

from __future__ import annotations

import json
import sys
from typing import Any


def emit(text: str) -> None:
    """Text for people, or a document already made."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def emit_json(document: Any) -> None:
    """Exactly one JSON document."""
    emit(json.dumps(document, indent=2, ensure_ascii=False))
