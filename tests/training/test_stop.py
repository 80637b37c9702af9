"""Stop signals: the first is remembered, the second ends the process, and workers just die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from mlm_cli.config.durations import parse_duration
from mlm_cli.training import stop as stop_module
from mlm_cli.training.stop import SIGNALS, TIME_LIMIT, Deadline, StopFlag, exit_code, find_deadline

WAIT = """
import time
from mlm_cli.training.stop import StopFlag
flag = StopFlag()
with flag.listening():
    print("ready", flush=True)
    while flag.received is None:
        time.sleep(0.01)
    print(flag.received.name, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_the_second_signal_ends_it_at_once(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", WAIT], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == f"{number.name}\n"
    begin = time.monotonic()
    process.send_signal(number)
    assert process.wait(timeout=10) == -number
    assert time.monotonic() - begin < 5


def test_handlers_are_put_back_and_flags_add_up() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    flag = StopFlag()
    with flag.listening():
        assert flag.flags() == [0.0, 0.0, 0.0, 0.0]
        os.kill(os.getpid(), signal.SIGUSR1)
        assert flag.received is signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) is before
    others = [[0.0] * 4, flag.flags(), [0.0, 0.0, 0.0, 1.0]]
    assert StopFlag.agreed([sum(column) for column in zip(*others, strict=True)]) is signal.SIGUSR1
    assert StopFlag.agreed([0.0] * 4) is None
    assert [exit_code(number) for number in SIGNALS] == [75, 75, 130]


def test_a_forked_worker_dies_when_told_to() -> None:
    with StopFlag().listening() as flag:
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)
        _, verdict = os.waitpid(child, 0)
        assert os.WTERMSIG(verdict) == signal.SIGTERM and flag.received is None


def test_durations() -> None:
    assert [parse_duration(text) for text in (90, "1.5", "1:30:00", "0:00:08", "2-12:00:00")] == [
        5400.0,
        90.0,
        5400.0,
        8.0,
        60 * 3600.0,
    ]
    for text in ("0", "-1", "1:30", "1:75:00", "soon", "nan"):
        with pytest.raises(ValueError):
            parse_duration(text)


def test_the_deadline_keeps_time_for_a_step_and_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(stop_module.time, "time", lambda: now)
    deadline = Deadline(1100.0, saving=10.0)
    looks = []
    for seconds in (0, 20, 20, 20, 20):  # at 1080 another step would end at 1100
        now += seconds
        looks.append(deadline.near())
    assert looks == [False, False, False, False, True]


def test_slurm_and_the_recipe_and_the_earlier_wins() -> None:
    assert find_deadline(None, {}) is None
    slurm = {"SLURM_JOB_END_TIME": str(int(time.time()) + 600)}
    only, both = find_deadline(None, slurm), find_deadline("0:05:00", slurm)
    assert only is not None and only.end == float(slurm["SLURM_JOB_END_TIME"])
    assert both is not None and both.end < only.end - 200
    flag = StopFlag(Deadline(time.time() - 1))
    assert StopFlag.agreed(flag.flags()) is TIME_LIMIT and exit_code(TIME_LIMIT) == 75
