"""Who hangs: told apart from who waits for it, on one rank, on several, and when a rank says nothing at all."""

from __future__ import annotations

import time
from typing import Any

import pytest

from mlm_cli import heartbeat
from mlm_cli.training import watchdog
from mlm_cli.training.watchdog import Pulse, Watchdog, judge


def pulses(*given: tuple[float, bool] | None, counts: tuple[int, ...] = (5, 5, 5)) -> dict[int, Pulse | None]:
    return {
        rank: None if one is None else Pulse(rank, counts[rank], one[0], one[1], f"in place {rank}")
        for rank, one in enumerate(given)
    }


def test_the_verdict() -> None:
    assert judge(pulses((1.0, False), (200.0, True)), 120.0) is None  # it waits for one that works
    assert judge(pulses((119.0, False), (200.0, False)), 120.0) is None
    hung = judge(pulses((130.0, True), (131.0, False), (130.0, True)), 120.0)
    assert hung == "rank 1 of 3 hangs: no progress for 131 s, in place 1"
    assert judge(pulses((1.0, False), None), 120.0) == "rank 1 of 2 hangs: no sign of life for 120 s"
    both = judge(pulses((130.0, True), (130.0, True), (130.0, True), counts=(5, 4, 4)), 120.0)
    assert both is not None and both.startswith("rank 1, 2 of 3 hang: ")  # they came least far


def test_a_rank_alone(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(watchdog, "_FIRST_STEP", 1)
    left: list[Any] = []
    with Watchdog(0, 1, 0.4, on_hang=left.append, leave=left.append):
        end = time.monotonic() + 1.2
        while time.monotonic() < end:  # slow, but alive
            heartbeat.beat()
            time.sleep(0.02)
        assert left == []
        end = time.monotonic() + 5
        while len(left) < 2 and time.monotonic() < end:
            time.sleep(0.05)
    assert left[0].startswith("rank 0 of 1 hangs: no progress for 0 s, in test_a_rank_alone") and left[1] == 6
    err = capfd.readouterr().err
    assert "most recent call first" in err and "test_a_rank_alone" in err and "error: rank 0 of 1 hangs" in err


def test_switched_off() -> None:
    with Watchdog(0, 2, 0.0) as dog:
        assert not dog._thread.is_alive()
