"""``logs/rank-N.log`` of a run folder: what a rank says on stderr is kept there too."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TextIO

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Tee:
    """A text stream that also writes to a log file, there without colours and overwritten progress lines."""

    def __init__(self, stream: TextIO, file: TextIO) -> None:
        self._stream, self._file = stream, file

    def write(self, text: str) -> int:
        plain = _CONTROL.sub("", text)
        if "\r" not in plain:
            self._file.write(plain)
        return self._stream.write(text)

    def flush(self) -> None:
        self._file.flush()
        self._stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def keep_log(log_folder: Path) -> None:
    """Copy this rank's stderr to its log from now on; a supervised rank above 0 writes there anyway."""
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0 and "MLM_SUPERVISED" in os.environ:
        return
    log_folder.mkdir(parents=True, exist_ok=True)
    file = (log_folder / f"rank-{rank}.log").open("a", encoding="utf-8", buffering=1)
    sys.stderr = Tee(sys.stderr, file)  # type: ignore[assignment]
