"""How far a long job is, in bytes: a bar on a terminal, a line every ten seconds elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from mlm_cli import log


class ByteProgress:
    """Shows MB done, MB/s and time left on stderr. Nothing is shown, or imported, during the first moments.

    Args:
        total: bytes in all, 0 if unknown. done: bytes that an earlier run had done.
    """

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self.what, self.total, self.start_done = what, total, done
        self._start = time.monotonic()
        self._shown = self._start
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int) -> None:
        """Say that ``done`` bytes are through."""
        now = time.monotonic()
        if log.is_quiet() or now - self._start < 0.5:
            return
        if sys.stderr.isatty():
            self._draw(done)
        elif now - self._shown >= 10:
            self._shown = now
            log.info(self.line(done, now - self._start))

    def line(self, done: int, seconds: float) -> str:
        """One line of plain text."""
        speed = (done - self.start_done) / max(seconds, 1e-9)
        text = f"{self.what}: {done / 1e6:,.0f} MB"
        if self.total:
            text = f"{self.what}: {done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB ({done / self.total:.0%})"
        text += f", {speed / 1e6:,.1f} MB/s"
        if self.total and speed > 0:
            left = max(0, self.total - done) / speed
            text += f", {int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d} left"
        return text

    def _draw(self, done: int) -> None:
        if self._bar is None:
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn(self.what),
                progress.BarColumn(),
                progress.DownloadColumn(),
                progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(),
                console=log.console(),
                transient=True,
            )
            self._task = self._bar.add_task("", total=self.total or None, completed=self.start_done)
            self._bar.start()
        self._bar.update(self._task, completed=done)
