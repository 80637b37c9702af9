"""Stop signals: the first is remembered, the second ends the process, and workers just die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from mlm_cli.training.stop import SIGNALS, StopFlag, exit_code

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
        assert flag.flags() == [0.0, 0.0, 0.0]
        os.kill(os.getpid(), signal.SIGUSR1)
        assert flag.received is signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) is before
    others = [[0.0, 0.0, 0.0], flag.flags(), [0.0, 0.0, 1.0]]
    assert StopFlag.agreed([sum(column) for column in zip(*others, strict=True)]) is signal.SIGUSR1
    assert StopFlag.agreed([0.0, 0.0, 0.0]) is None
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
