"""N ranks on this machine: the same command started N times, watched until the last one has ended.

A signal to the supervisor goes to every rank, a second one kills them at once. A rank that dies takes the others down
within ``GRACE + TERM`` seconds, so that nobody waits half an hour in a collective for a rank that is gone.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from mlm_cli import log
from mlm_cli.errors import UsageError
from mlm_cli.launch.environment import threads_per_rank
from mlm_cli.launch.verdict import RANK_LOST, Exit, Verdict, judge

GRACE = 3.0  # seconds for the other ranks to fail by themselves with their own words
TERM = 4.0  # seconds from SIGTERM to SIGKILL
POLL = 0.05
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def run_local(
    command: Sequence[str], nproc: int, *, log_folder: Path | None = None, share_terminal: bool = False
) -> int:
    """Run ``command`` as ``nproc`` ranks and return the exit code of the job.

    Args:
        command: program and arguments; ranks differ by their environment alone.
        nproc: number of ranks.
        log_folder: where rank N > 0 writes its stderr as ``rank-N.log``; unset: a temporary folder.
        share_terminal: leave the ranks in our process group, so that rank 0 can read from the terminal.
    """
    if nproc > 16 * (os.cpu_count() or 1):
        raise UsageError(f"`--nproc {nproc}` on a machine with {os.cpu_count()} cores", hint="use fewer ranks")
    with tempfile.TemporaryDirectory(prefix="mlm-") as scratch:
        folder = log_folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        supervisor = Supervisor(command, nproc, folder, share_terminal)
        verdict = supervisor.run()
        report(verdict, folder, supervisor.exits)
        return verdict.code


class Supervisor:
    """Starts the ranks, forwards signals, and ends them all when one is lost."""

    def __init__(self, command: Sequence[str], nproc: int, log_folder: Path, share_terminal: bool = False) -> None:
        self.command, self.nproc, self.log_folder, self.share_terminal = (
            list(command),
            nproc,
            log_folder,
            share_terminal,
        )
        self.ranks: list[subprocess.Popen[bytes]] = []
        self.exits: dict[int, Exit] = {}
        self.first_signal: int | None = None
        self.sent: set[int] = set()
        self.started = time.monotonic()
        self.told_to_end: float | None = None

    def run(self) -> Verdict:
        """Start all ranks, wait for all of them."""
        previous: dict[int, Any] = {number: signal.signal(number, self._forward) for number in FORWARDED}
        try:
            with meeting_place() as door:
                for rank in range(self.nproc):
                    self.ranks.append(self._start(rank, door))
            self._watch()
        finally:
            for process in self.ranks:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            for number, handler in previous.items():
                signal.signal(number, handler)
        verdict = judge(list(self.exits.values()))
        asked = verdict.culprit is not None and verdict.culprit.ours and verdict.code == RANK_LOST
        if asked and self.first_signal is not None:
            return Verdict(128 + self.first_signal)  # ended by the user's signal before anyone could do better
        return verdict

    def _start(self, rank: int, door: socket.socket) -> subprocess.Popen[bytes]:
        env = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.nproc),
            "LOCAL_WORLD_SIZE": str(self.nproc),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(door.getsockname()[1]),
            "MLM_SUPERVISED": str(os.getpid()),
        }
        env.setdefault("OMP_NUM_THREADS", str(threads_per_rank(self.nproc)))
        if "GLOO_SOCKET_IFNAME" not in env and any(name == "lo" for _, name in socket.if_nameindex()):
            env["GLOO_SOCKET_IFNAME"] = "lo"  # without it gloo looks up the host name, which may not resolve
        own_session = not self.share_terminal
        if rank == 0:
            env["MLM_MASTER_FD"] = str(door.fileno())
            return subprocess.Popen(self.command, env=env, start_new_session=own_session, pass_fds=(door.fileno(),))
        with (self.log_folder / f"rank-{rank}.log").open("ab") as err:
            return subprocess.Popen(
                self.command, env=env, stdin=subprocess.DEVNULL, stdout=err, stderr=err, start_new_session=own_session
            )

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        if self.share_terminal and number == signal.SIGINT:
            self.sent.add(number)
            return  # the terminal has sent it to the whole group, where it may stop a reply and end nothing
        again = self.first_signal is not None and number != signal.SIGUSR1
        self.first_signal = self.first_signal or number
        self._send(signal.SIGKILL if again else signal.Signals(number))

    def _send(self, number: signal.Signals) -> None:
        self.sent.add(number)
        for process in self.ranks:
            if process.poll() is None:
                process.send_signal(number)

    def _watch(self) -> None:
        while len(self.exits) < self.nproc:
            now = time.monotonic() - self.started
            for rank, process in enumerate(self.ranks):
                code = process.poll()
                if code is not None and rank not in self.exits:
                    ours = self.told_to_end is not None or -code in self.sent
                    self.exits[rank] = Exit(rank, code, now, ours)
            self._end_the_others(now)
            if len(self.exits) < self.nproc:
                time.sleep(POLL)

    def _end_the_others(self, now: float) -> None:
        lost = [item.time for item in self.exits.values() if item.code != 0]
        if not lost or len(self.exits) == self.nproc:
            return
        if self.told_to_end is None:
            if now > min(lost) + GRACE:
                self.told_to_end = now
                self._send(signal.SIGTERM)
        elif now > self.told_to_end + TERM:
            self._send(signal.SIGKILL)


def report(verdict: Verdict, log_folder: Path, exits: dict[int, Exit]) -> None:
    """Say what nobody has said yet: rank 0 talks for itself, the others only wrote to their logs."""
    culprit = verdict.culprit
    if culprit is None or (0 in exits and exits[0].code == verdict.code and verdict.code not in (1, RANK_LOST)):
        return
    if culprit.code == RANK_LOST and 0 in exits and exits[0].code == RANK_LOST:
        return  # rank 0 has named the rank that hangs, or that it lost
    path = log_folder / f"rank-{culprit.rank}.log"
    said = last_words(path) if culprit.rank > 0 else ""
    if culprit.code == RANK_LOST and said.startswith("error: "):
        log.error(said.splitlines()[0].removeprefix("error: "), None)
    elif verdict.code == RANK_LOST:
        hint = f"its last words:\n{said}" if said else "`-v` shows more; its log is beside the others in `logs/`"
        where = f"rank {culprit.rank} of {len(exits)} was lost on {socket.gethostname()}"
        log.error(f"{where} after {culprit.time:.0f} s: {culprit.cause}", hint)
    elif culprit.rank > 0:
        log.error(f"rank {culprit.rank} {culprit.cause}" + (f":\n{said}" if said else ""), None)


def last_words(path: Path, limit: int = 15) -> str:
    """The last lines of a rank's log, from its last ``error:`` line if there is one."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-200:]
    except OSError:
        return ""
    marks = [number for number, line in enumerate(lines) if line.startswith("error:")]
    return "\n".join(lines[marks[-1] :] if marks else lines[-limit:])


def meeting_place() -> socket.socket:
    """A socket that listens on the loopback, for rank 0 to inherit: no port is given up that another could take."""
    door = socket.socket()
    door.bind(("127.0.0.1", 0))
    door.listen(1024)
    return door


def free_port() -> int:
    """A port on the loopback that nobody listened on a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def same_command() -> list[str]:
    """This very command line, to be started again as a rank."""
    return [sys.executable, "-m", "mlm_cli", *sys.argv[1:]]


def die_with_parent(on_orphan: Callable[[], None] | None = None) -> None:
    """As a rank: get SIGTERM when the supervisor dies, even by SIGKILL, instead of running on unwatched (Linux)."""
    supervisor = os.environ.get("MLM_SUPERVISED")
    if supervisor is None or sys.platform != "linux":
        return
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != int(supervisor):
        (on_orphan or (lambda: sys.exit(RANK_LOST)))()
