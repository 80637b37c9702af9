"""Exceptions to exit codes, without running a job."""

from __future__ import annotations

import errno

import pytest

from mlm_cli import errors
from mlm_cli.cli.failures import exit_code_of


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError("x"), 2),
        (errors.DataError("x"), 3),
        (errors.CheckpointError("x"), 4),
        (errors.NumericsError("x"), 5),
        (errors.RankLostError("x"), 6),
        (errors.ResourceError("x"), 7),
        (errors.StoppedError("x"), 75),
        (KeyboardInterrupt(), 130),
        (MemoryError(), 7),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 7),
        (OSError(errno.EROFS, "Read-only file system", "/x"), 4),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 7),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: 12 bytes"), 7),
        (ValueError("x"), 1),
        (SystemExit(4), 4),
        (SystemExit(None), 0),
    ],
)
def test_codes(error: BaseException, code: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(error, ["pretrain"]) == code
    err = capfd.readouterr().err
    assert ("Traceback" in err or "ValueError: x" in err) == (code == 1)


def test_a_lost_neighbour_is_code_6_only_among_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4321")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert exit_code_of(error, []) == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert exit_code_of(error, []) == 6


def test_a_bug_asks_for_a_report(capfd: pytest.CaptureFixture[str]) -> None:
    exit_code_of(ValueError("surprise"), [])
    err = capfd.readouterr().err
    assert "error: a bug in mlm: ValueError: surprise" in err and "mlm doctor" in err
