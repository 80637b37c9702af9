"""One piece of work in a thread of its own, whose error waits for whoever asks; and whether memory allows the copy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


class Work(Generic[T]):
    """Runs ``job`` at once, or in a thread. The job must not call collectives: the main thread does.

    Attributes:
        seconds: how long it took, when it is done.
    """

    def __init__(self, job: Callable[[], T], *, in_thread: bool) -> None:
        self._job, self._value, self._error = job, None, None  # type: ignore[var-annotated]
        self.seconds = 0.0
        self._thread: threading.Thread | None = None
        if in_thread:
            self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._run()

    def _run(self) -> None:
        begin = time.perf_counter()
        try:
            self._value = self._job()
        except BaseException as error:
            self._error = error
        self.seconds = time.perf_counter() - begin

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Until it is over, well or badly."""
        if self._thread is not None:
            self._thread.join()

    def result(self) -> T:
        """Wait for the end; its value, or its error raised here."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]


def has_room_for(num_bytes: int) -> bool:
    """Would a copy of this size leave a tenth of what is free now? True where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return True
    return num_bytes < 0.9 * free
