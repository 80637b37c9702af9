"""Fair timing of rivals: each in a process of its own, taking turns, judged by the median of paired ratios.

A worker is any program that prints ``ready`` when warmed up, then for each line ``N`` on stdin does ``N`` units of work
and prints one JSON object with at least ``seconds``. While one works the others wait on their stdin, so all see
the same machine; drift of its speed hits neighbours in a round alike and cancels in the ratio.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Worker:
    """One contender. ``times`` holds seconds a unit of work, one entry a round."""

    name: str
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None

    def start(self, timeout: float = 600.0) -> None:
        """Start the process and wait until it says ``ready``; a worker that cannot is kept out, with its last words."""
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **self.env},
        )  # fmt: skip
        deadline = time.monotonic() + timeout
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == "ready":
                return
            if time.monotonic() > deadline:
                break
        self.process.kill()
        words = (self.process.stderr.read() if self.process.stderr else "").strip().splitlines()
        self.failure = words[-1] if words else "it never said that it was ready"

    def turn(self, units: int) -> float:
        """Let it do ``units`` of work. Returns seconds a unit."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{units}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                self.last = json.loads(line)
                return float(self.last["seconds"]) / units
        raise RuntimeError(f"{self.name} died: {self.process.stderr.read()[-2000:] if self.process.stderr else ''}")

    def stop(self) -> None:
        if self.process.stdin:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def serve(work: Any) -> None:
    """The worker's side: ``work(n)`` does n units and returns a dict of extra figures (or None)."""
    print("ready", flush=True)
    for line in sys.stdin:
        units = int(line)
        start = time.perf_counter()
        extra = work(units) or {}
        print(json.dumps({"seconds": time.perf_counter() - start, **extra}), flush=True)


def interleave(workers: list[Worker], *, rounds: int, units: int) -> list[Worker]:
    """Let all that start take turns. Returns those that ran; the others carry ``failure``."""
    for worker in workers:
        worker.start()
    running = [worker for worker in workers if worker.failure is None]
    try:
        for number in range(rounds):
            order = running if number % 2 == 0 else running[::-1]
            for worker in order:
                worker.times.append(worker.turn(units))
    finally:
        for worker in running:
            worker.stop()
    return running


def ratio(rival: Worker, ours: Worker) -> float:
    """How many times as fast as the rival we are: the median over rounds of rival time / our time."""
    return statistics.median(theirs / mine for theirs, mine in zip(rival.times, ours.times, strict=True))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        flags = cpuinfo.read_text()
        model = next((line.split(":")[1].strip() for line in flags.splitlines() if line.startswith("model name")), "")
        model += (
            " ("
            + ", ".join(name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {name}" in flags)
            + ")"
        )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": model or platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
    }


def save(name: str, report: dict[str, Any]) -> Path:
    """Write ``benchmarks/results/NAME.json`` with machine, date and command."""
    folder = Path(__file__).resolve().parent / "results"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    command = "python " + " ".join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]])
    path.write_text(json.dumps({"machine": machine(), "command": command, **report}, indent=2) + "\n")
    return path
