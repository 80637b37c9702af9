"""The heartbeat: a rank that hangs is found and named, every rank's stack is dumped, and the job ends with code 6.

On each rank a thread watches the progress of its own main thread and tells the others through the rendezvous store (a
connection of its own: no collective). A rank that waits for others in a collective is a victim, not a culprit; as long
as any rank makes progress the others may wait for it as long as it takes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, Protocol

from mlm_cli import heartbeat, log
from mlm_cli.errors import RankLostError
from mlm_cli.parallel.context import ParallelContext

# Innermost frames in these files mean: waiting for other ranks.
_WAITING = ("distributed/distributed_c10d.py", "mlm_cli/parallel/shared_memory.py")
_FIRST_STEP = 5  # compiling and warming up: times the limit


class Store(Protocol):
    """What of ``torch.distributed.Store`` is used."""

    def set(self, key: str, value: str) -> None: ...

    def multi_get(self, keys: list[str]) -> list[bytes]: ...


@dataclass(frozen=True)
class Pulse:
    """What one rank tells: seconds without progress, whether it waits for others, and where it is."""

    rank: int
    count: int
    silence: float
    waiting: bool
    where: str


def judge(pulses: Mapping[int, Pulse | None], limit: float) -> str | None:
    """Who hangs, in words; None while all is well. ``pulses``: of all ranks, None for a rank that tells nothing more.

    When all ranks wait for each other, those that came least far are named.
    """
    size = len(pulses)
    mute = [rank for rank, pulse in pulses.items() if pulse is None]
    if mute:
        return f"rank {_listed(mute)} of {size} {_hangs(mute)}: no sign of life for {limit:.0f} s"
    alive = [pulse for pulse in pulses.values() if pulse is not None]
    if any(pulse.silence < limit for pulse in alive):
        return None
    stuck = [pulse for pulse in alive if not pulse.waiting]
    if not stuck:
        least = min(pulse.count for pulse in alive)
        stuck = [pulse for pulse in alive if pulse.count == least]
    ranks = [pulse.rank for pulse in stuck]
    return (
        f"rank {_listed(ranks)} of {size} {_hangs(ranks)}: no progress for {stuck[0].silence:.0f} s, {stuck[0].where}"
    )


def _listed(ranks: list[int]) -> str:
    return ", ".join(str(rank) for rank in ranks)


def _hangs(ranks: list[int]) -> str:
    return "hangs" if len(ranks) == 1 else "hang"


class Watchdog:
    """Watches from ``start()`` to ``close()``.

    Args:
        limit: seconds without progress; 0: no watching.
        on_hang: told the verdict on every rank before the process ends; for ``status.json``.
        store: None: that of the launcher, by MASTER_ADDR and MASTER_PORT.
        leave: ends the process with an exit code.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        limit: float,
        *,
        on_hang: Callable[[str], None] = lambda verdict: None,
        store: Store | None = None,
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        self.rank, self.size, self.limit, self.on_hang, self.leave = rank, size, limit, on_hang, leave
        self._store = store
        self._main = threading.main_thread().ident
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._deaf_since: float | None = None

    def start(self) -> Watchdog:
        heartbeat.beat()
        heartbeat.warm = False
        if self.limit > 0:
            if self.size > 1 and self._store is None:
                self._store = _connect(self.limit)
            if self._store is not None:
                self._tell()  # before any other rank looks
            self._thread.start()
        return self

    def close(self) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
            if self._store is not None:
                with contextlib.suppress(Exception):  # its rank has left
                    self._store.set(_key(self.rank), "")  # no more to come, and all is well

    def __enter__(self) -> Watchdog:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _watch(self) -> None:
        while not self._end.wait(min(2.0, self.limit / 8)):
            limit = self.limit * (1 if heartbeat.warm else _FIRST_STEP)
            verdict = judge(self._pulses(limit), limit)
            if verdict is not None and not self._end.is_set():
                self._give_up(verdict)
                return

    def pulse(self) -> Pulse:
        """That of this rank."""
        frame = sys._current_frames().get(self._main or 0)
        return Pulse(self.rank, heartbeat.count, heartbeat.silence(), _is_waiting(frame), _where(frame))

    def _pulses(self, limit: float) -> dict[int, Pulse | None]:
        mine = self.pulse()
        if self._store is None:
            return {self.rank: mine}
        now = time.monotonic()
        try:
            self._tell()
            told = self._store.multi_get([_key(rank) for rank in range(self.size)])
            self._deaf_since = None
        except Exception as error:  # the store's rank is gone or stopped; its supervisor notices the former
            self._deaf_since = self._deaf_since or now
            log.detail(f"the heartbeat's store does not answer: {error}")
            silent = now - self._deaf_since >= limit
            return {rank: None if rank == 0 and silent else mine for rank in range(self.size)}
        for rank, value in enumerate(told):
            if rank not in self._heard or self._heard[rank][0] != value:
                self._heard[rank] = (value, now)
        return {
            rank: Pulse(**json.loads(value)["pulse"]) if now - heard < limit else None
            for rank, (value, heard) in self._heard.items()
            if value  # else it has ended
        }

    def _tell(self) -> None:
        assert self._store is not None
        self._store.set(_key(self.rank), json.dumps({"at": time.time(), "pulse": asdict(self.pulse())}))

    def _give_up(self, verdict: str) -> None:
        """Stacks into the log, words to the user, and out: the main thread may never return."""
        faulthandler.dump_traceback(file=_log_descriptor(), all_threads=True)
        self._end.wait(min(2.0, self.limit / 4))  # the other ranks look, and dump theirs, too
        log.error(verdict, hint="every rank's stack is in logs/rank-N.log; train.heartbeat sets the patience")
        try:
            self.on_hang(verdict)
        finally:
            sys.stderr.flush()
            self.leave(RankLostError.exit_code)


def longest_wait(heartbeat_limit: float) -> float:
    """Seconds that a collective, or the meeting of the ranks, may take."""
    return max(60.0, 5 * heartbeat_limit) if heartbeat_limit > 0 else 1800.0


def limit_waits(parallel: ParallelContext, heartbeat_limit: float) -> None:
    """No collective waits for half an hour: five times the heartbeat's limit ends it, should the watchdog be gone."""
    if heartbeat_limit <= 0 or parallel.world.size == 1:
        return
    import torch.distributed as dist

    seconds = longest_wait(heartbeat_limit)
    axes = (parallel.tensor, parallel.data, parallel.pipeline, parallel.context, parallel.replicas)
    for group in (parallel.world, *axes):
        if group.handle is not None:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group.handle)
        if group.shared is not None:
            group.shared.timeout = seconds


def _key(rank: int) -> str:
    return f"mlm-pulse-{rank}"


def _connect(limit: float) -> Store:
    """Another connection to the store that the ranks met at."""
    import torch.distributed as dist

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=max(5.0, limit / 4)))


def _frames(frame: FrameType | None, most: int = 12) -> list[FrameType]:
    found = []
    while frame is not None and len(found) < most:
        found.append(frame)
        frame = frame.f_back
    return found


def _is_waiting(frame: FrameType | None) -> bool:
    return any(one.f_code.co_filename.endswith(_WAITING) for one in _frames(frame, 6))


def _where(frame: FrameType | None) -> str:
    """The innermost line of this project that the main thread is in, and of what it calls."""
    frames = _frames(frame, 60)
    if not frames:
        return "before its first line"
    own = next((one for one in frames if "/mlm_cli/" in one.f_code.co_filename), frames[0])
    text = f"in {own.f_code.co_name} ({own.f_code.co_filename.rpartition('/mlm_cli/')[2]}:{own.f_lineno})"
    return text if own is frames[0] else f"{text}, calling {frames[0].f_code.co_name}"


def _log_descriptor() -> int:
    """Where a rank's stack goes: its log file, which `launch/rank_log.py` puts behind stderr, else stderr itself."""
    file = getattr(sys.stderr, "_file", None)
    try:
        return (file or sys.__stderr__ or sys.stderr).fileno()
    except (OSError, ValueError, AttributeError):
        return 2
