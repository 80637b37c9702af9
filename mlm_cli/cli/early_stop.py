"""Signals that reach a training command before its job listens for them (``training/stop.py``).

Seconds pass with importing, a minute on a busy file system. Nothing has begun by then, so the process leaves at once;
its exit code tells a job script what it tells later: put the job back in the queue.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mlm_cli import log
from mlm_cli.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # Python itself raises KeyboardInterrupt for SIGINT


@contextmanager
def leaving() -> Iterator[None]:
    """Inside the block these signals end the process with code 75, until somebody else handles them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def leave(number: int, _frame: FrameType | None) -> None:
        if os.getpid() != owner:  # forked: as without us
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        log.info(
            f"{signal.Signals(number).name}: stopped before there was anything to save; give the same command again"
        )
        sys.stderr.flush()
        os._exit(StoppedError.exit_code)

    before = {number: signal.signal(number, leave) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
