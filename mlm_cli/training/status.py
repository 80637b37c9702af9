"""``status.json``: where a run stands, for job scripts; replaced atomically, so a reader never sees half of it."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any, Literal

from mlm_cli.checkpoint.folder import RunFolder, write_atomic

State = Literal["starting", "running", "finished", "stopped", "failed"]


class Status:
    """Written by rank 0 alone; on other ranks every call does nothing.

    ``state`` is one of ``starting running finished stopped failed``; ``exit_code`` is null while the run lives. A run
    that was killed leaves ``running`` behind, with the ``pid`` and ``host`` that no longer answer.
    """

    def __init__(self, run: RunFolder, *, steps: int, active: bool = True) -> None:
        self.run, self.active = run, active
        self.values: dict[str, Any] = {
            "state": "starting",
            "step": 0,
            "steps": steps,
            "exit_code": None,
            "checkpoint": None,
            "message": None,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": _now(),
        }

    def update(self, state: State | None = None, **values: Any) -> None:
        """Change some values and write the file. Not made durable: it says what is, not what was."""
        if not self.active:
            return
        if state is not None:
            self.values["state"] = state
        self.values.update(values, updated=_now())
        try:
            write_atomic(self.run.status, json.dumps(self.values, indent=1) + "\n", durable=False)
        except OSError:
            if state != "failed":  # a full disk must not hide the error that is being reported
                raise


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
