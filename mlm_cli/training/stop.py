"""What asks a run to stop, a signal or the end of its time: noticed on one rank, obeyed by all, with a checkpoint."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from mlm_cli.config.durations import parse_duration
from mlm_cli.errors import StoppedError
from mlm_cli.parallel.context import ParallelContext

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
EXIT_INTERRUPTED = 130
_MARGIN = 2.0  # seconds for leaving


class TimeLimit:
    """The cause of a stop that no signal asked for."""

    name = "time limit"


TIME_LIMIT = TimeLimit()
Cause = signal.Signals | TimeLimit
CAUSES: tuple[Cause, ...] = (signal.SIGTERM, signal.SIGUSR1, TIME_LIMIT, signal.SIGINT)


class Interrupted(Exception):
    """All ranks agreed to stop in the middle of an evaluation."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause.name)
        self.cause = cause


class Deadline:
    """When the job must be gone, and whether that is too near for another step.

    Between two looks lie a step and what is due after it; the longest time seen is kept free, and the time of a save.

    Args:
        end: in seconds since the epoch.
        saving: how long a save is thought to take, in seconds; the job sets it when it knows the size.
    """

    def __init__(self, end: float, *, saving: float = 0.0) -> None:
        self.end, self.saving = end, saving
        self._last: float | None = None
        self._longest = 0.0

    def near(self) -> bool:
        now = time.time()
        if self._last is not None:
            self._longest = max(self._longest, now - self._last)
        self._last = now
        return now + 1.2 * self._longest + self.saving + _MARGIN >= self.end


def find_deadline(limit: str | float | None, environ: Mapping[str, str] | None = None) -> Deadline | None:
    """The earlier of ``train.time_limit``, counted from the start of this process, and Slurm's end of the job."""
    environ = os.environ if environ is None else environ
    ends = []
    if limit is not None:
        ends.append(_process_start() + parse_duration(limit))
    slurm = environ.get("SLURM_JOB_END_TIME", "")
    if slurm.isdigit():
        ends.append(float(slurm))
    return Deadline(min(ends)) if ends else None


def _process_start() -> float:
    """Seconds since the epoch; importing torch took its share of the time that was granted."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        running = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        running = time.process_time()
    return time.time() - running


class StopFlag:
    """Remembers the first stop signal; a second one ends the process at once, as it would without us."""

    def __init__(self, deadline: Deadline | None = None) -> None:
        self.received: signal.Signals | None = None
        self.deadline = deadline

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
        """One number per cause, to be summed over ranks."""
        near = self.deadline is not None and self.deadline.near()
        return [float(near if cause is TIME_LIMIT else self.received is cause) for cause in CAUSES]

    @staticmethod
    def agreed(sums: list[float]) -> Cause | None:
        """What some rank was stopped by, from the summed flags; Ctrl-C gives way to a scheduler's wish."""
        return next((cause for cause, total in zip(CAUSES, sums, strict=True) if total > 0), None)

    def agree(self, parallel: ParallelContext) -> Cause | None:
        """Ask all ranks; they call together."""
        sums = torch.tensor(self.flags(), dtype=torch.float64, device=parallel.device)
        return self.agreed(parallel.world.all_reduce_(sums).tolist())

    def interrupt(self, parallel: ParallelContext) -> None:
        """Raise ``Interrupted`` on all ranks when one of them was told to stop; they call together."""
        cause = self.agree(parallel)
        if cause is not None:
            raise Interrupted(cause)


def exit_code(cause: Cause) -> int:
    return EXIT_INTERRUPTED if cause is signal.SIGINT else StoppedError.exit_code
