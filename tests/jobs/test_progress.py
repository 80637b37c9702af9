"""Progress of long jobs: what is said, and that short or quiet ones say nothing."""

from __future__ import annotations

import pytest

from mlm_cli import log
from mlm_cli.jobs.progress import ByteProgress


def test_line() -> None:
    show = ByteProgress("preprocess", 200_000_000, 50_000_000)
    assert show.line(100_000_000, 10.0) == "preprocess: 100 of 200 MB (50%), 5.0 MB/s, 0:00:20 left"
    assert ByteProgress("reading", 0).line(3_000_000, 2.0) == "reading: 3 MB, 1.5 MB/s"


def test_a_line_every_ten_seconds_off_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr("mlm_cli.jobs.progress.time.monotonic", lambda: now[0])
    with ByteProgress("preprocess", 1000) as show:
        for second in range(31):
            now[0] = 100.0 + second
            show.update(second)
    assert capsys.readouterr().err.count("preprocess: ") == 3
    monkeypatch.setattr(log, "_quiet", True)
    with ByteProgress("preprocess", 1000) as show:
        now[0] += 60
        show.update(5)
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import io

    from rich.console import Console

    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(log, "console", lambda: Console(file=screen, force_terminal=True, width=100))
    with ByteProgress("preprocess", 4_000_000) as show:
        show._start -= 1
        show.update(2_000_000)
        show.update(4_000_000)
    assert "preprocess" in screen.getvalue() and "4.0/4.0 MB" in screen.getvalue()
