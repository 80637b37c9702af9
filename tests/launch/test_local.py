"""Supervision of local ranks, with small scripts as ranks: exit codes, signals, logs, no orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mlm_cli.launch import local
from mlm_cli.launch.local import GRACE, run_local

ROOT = Path(__file__).resolve().parents[2]


def script(body: str) -> list[str]:
    head = "import os, signal, sys, time\nrank, world = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])\n"
    return [sys.executable, "-c", head + textwrap.dedent(body)]


def supervise(body: str, nproc: int, folder: Path) -> subprocess.Popen[str]:
    """A supervisor in a process of its own, so that it can be sent signals."""
    code = "import sys; from pathlib import Path; from mlm_cli.launch.local import run_local\n"
    code += f"sys.exit(run_local({script(body)!r}, {nproc}, log_folder=Path({str(folder)!r})))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def wait_for(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 20
    while len(list(folder.glob("ready-*"))) < count:
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.02)


def ready(folder: Path) -> str:
    return f"open({str(folder)!r} + f'/ready-{{rank}}-{{os.getpid()}}', 'w').close()\n"


def pids(folder: Path) -> list[int]:
    return [int(path.name.split("-")[2]) for path in folder.glob("ready-*")]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


def test_ranks_see_who_they_are(tmp_path: Path) -> None:
    code = run_local(
        script(
            f"""
            names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', 'OMP_NUM_THREADS')
            open({str(tmp_path)!r} + f'/{{rank}}.txt', 'w').write(' '.join(os.environ[name] for name in names))
            """
        ),
        3,
        log_folder=tmp_path,
    )
    assert code == 0
    rows = [(tmp_path / f"{rank}.txt").read_text().split() for rank in range(3)]
    assert [row[:4] for row in rows] == [[str(rank), str(rank), "3", "127.0.0.1"] for rank in range(3)]
    assert len({row[4] for row in rows}) == 1 and all(int(row[5]) >= 1 for row in rows)


def test_rank_0_is_handed_the_socket_that_the_others_will_ask_at(tmp_path: Path) -> None:
    """The port was never free between its choice and its use."""
    body = f"""
    import socket
    fd = os.environ.get('MLM_MASTER_FD')
    if rank == 0:
        door = socket.socket(fileno=int(fd))
        assert door.getsockname() == ('127.0.0.1', int(os.environ['MASTER_PORT']))
        assert door.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        {ready(tmp_path).strip()}
        assert door.accept()[0].recv(5) == b'hello'
    else:
        assert fd is None
        socket.create_connection(('127.0.0.1', int(os.environ['MASTER_PORT'])), timeout=20).sendall(b'hello')
    """
    assert run_local(script(body), 2, log_folder=tmp_path) == 0


def test_the_same_error_on_every_rank_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = "print('error: no such file', file=sys.stderr); sys.exit(3)"
    assert run_local(script(body), 3, log_folder=tmp_path) == 3
    assert capfd.readouterr().err.count("error:") == 1
    assert "no such file" in (tmp_path / "rank-2.log").read_text()


def test_an_error_of_one_rank_is_told_and_ends_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
    if rank == 1:
        print('talk\\nerror: bad shard\\nhint: fetch it again', file=sys.stderr); sys.exit(4)
    time.sleep(60)
    """
    start = time.monotonic()
    assert run_local(script(body), 2, log_folder=tmp_path) == 4
    assert time.monotonic() - start < 10
    err = capfd.readouterr().err
    assert "rank 1" in err and "error: bad shard" in err and "fetch it again" in err and "talk" not in err


def test_a_killed_rank_takes_the_job_down_in_time_and_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    body = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the worst neighbour: waits for ever and ignores SIGTERM
    if rank == 2:
        print('reading sample 7', file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    """
    start = time.monotonic()
    assert run_local(script(body), 3, log_folder=tmp_path) == 6
    assert time.monotonic() - start < 10
    err = capfd.readouterr().err
    assert "rank 2 of 3 was lost" in err and "SIGKILL" in err and "reading sample 7" in err


def test_rank_0_lost(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = "time.sleep(0.2) if rank else os.abort()\nsys.exit(1 if rank else 0)"
    assert run_local(script(body), 2, log_folder=tmp_path) == 6
    assert "rank 0 of 2 was lost" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_every_rank_once(tmp_path: Path, number: signal.Signals) -> None:
    body = f"""
    got = []
    for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(n, lambda number, frame: got.append(number))
    {ready(tmp_path).strip()}
    while not got: time.sleep(0.01)
    time.sleep(0.3)
    sys.exit(75 if got == [{int(number)}] else 9)
    """
    process = supervise(body, 2, tmp_path)
    wait_for(tmp_path, 2)
    process.send_signal(number)
    assert process.wait(timeout=20) == 75


def test_a_second_signal_kills_at_once(tmp_path: Path) -> None:
    body = "for n in (15, 2): signal.signal(n, signal.SIG_IGN)\n" + ready(tmp_path) + "time.sleep(60)"
    process = supervise(body, 2, tmp_path)
    wait_for(tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    assert time.monotonic() - start < GRACE  # nobody was given time to fail by himself
    assert all(gone(pid) for pid in pids(tmp_path))


def test_ranks_without_a_handler_end_as_any_program_would(tmp_path: Path) -> None:
    process = supervise(ready(tmp_path) + "time.sleep(60)", 2, tmp_path)
    wait_for(tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals are Linux's")
def test_no_orphans_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    body = "from mlm_cli.launch.local import die_with_parent; die_with_parent()\n" + ready(tmp_path) + "time.sleep(60)"
    process = supervise(body, 2, tmp_path)
    wait_for(tmp_path, 2)
    ranks = pids(tmp_path)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while not all(gone(pid) for pid in ranks):
        assert time.monotonic() < deadline, "ranks outlived their supervisor"
        time.sleep(0.05)


def test_last_words_begin_at_the_last_error(tmp_path: Path) -> None:
    path = tmp_path / "rank-1.log"
    path.write_text("error: old\nnoise\nerror: new\nhint: do\n")
    assert local.last_words(path) == "error: new\nhint: do"
    path.write_text("\n".join(str(number) for number in range(100)))
    assert local.last_words(path, limit=2) == "98\n99"
    assert local.last_words(tmp_path / "none") == ""
