"""Signals that ask a run to stop: noticed on one rank, obeyed by all at the same step, with a checkpoint."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
EXIT_REQUEUE = 75
EXIT_INTERRUPTED = 130


class StopFlag:
    """Remembers the first stop signal; a second one ends the process at once, as it would without us."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    @contextmanager
    def listening(self) -> Iterator[StopFlag]:
        """Handle the signals while the block runs. Main thread only."""
        owner = os.getpid()

        def handle(number: int, frame: FrameType | None) -> None:
            if os.getpid() != owner or self.received is not None:
                # Forked loader workers inherit this handler but must die when told to.
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
                return
            self.received = signal.Signals(number)

        before: dict[signal.Signals, Any] = {number: signal.signal(number, handle) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def flags(self) -> list[float]:
        """One number per signal, to be summed over ranks."""
        return [float(self.received is number) for number in SIGNALS]

    @staticmethod
    def agreed(sums: list[float]) -> signal.Signals | None:
        """The signal that some rank received, from the summed flags; Ctrl-C gives way to a scheduler's signal."""
        return next((number for number, total in zip(SIGNALS, sums, strict=True) if total > 0), None)


def exit_code(received: signal.Signals) -> int:
    return EXIT_INTERRUPTED if received is signal.SIGINT else EXIT_REQUEUE
