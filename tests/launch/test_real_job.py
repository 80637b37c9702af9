"""Real jobs on several ranks, started in every way this machine offers, killed and stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENDLESS = ["train.steps=100000", "evaluate.every=0", "checkpoint.every=0", "log.every=1", "log.tensorboard=false"]


def start(folder: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        env.pop(name, None)
    command = [*(launcher or (sys.executable,)), "-m", "mlm_cli", *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_text: Path) -> Path:
    folder = tmp_path_factory.mktemp("job")
    done = start(folder, "preprocess", str(tiny_text), "--tokenizer", "bytes", "--output", "data")
    assert done.wait(timeout=60) == 0, done.communicate()
    return folder


def train(folder: Path, name: str, *more: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return start(folder, "pretrain", "debug/gpt", "data.path=data", "--output", name, *more, launcher=launcher)


def wait_for_step(run: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no step was taken"
        time.sleep(0.1)


def ranks_of(supervisor: int) -> dict[int, int]:
    """rank -> process id of the supervisor's children."""
    found = {}
    for task in Path(f"/proc/{supervisor}/task").iterdir():
        for child in (task / "children").read_text().split():
            environ = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            ranks = [int(item[5:]) for item in environ if item.startswith(b"RANK=")]
            if ranks:
                found[ranks[0]] = int(child)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_rank_ends_the_job_with_code_6(folder: Path) -> None:
    process = train(folder, "killed", "parallel.tensor=2", "--nproc", "2", *ENDLESS)
    wait_for_step(folder / "killed", process)
    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    start_time = time.monotonic()
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - start_time < 10
    assert process.returncode == 6
    assert f"rank 1 of 2 was lost on {socket.gethostname()} after" in err and "SIGKILL" in err
    status = json.loads((folder / "killed" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 6)


def test_sigterm_to_the_supervisor_saves_and_asks_to_be_requeued(folder: Path) -> None:
    process = train(folder, "stopped", "parallel.tensor=2", "--nproc", "2", "--format", "json", *ENDLESS)
    wait_for_step(folder / "stopped", process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert json.loads(out)["exit_code"] == 75  # one document, though two ranks ran
    assert (folder / "stopped" / "latest").exists()
    logs = folder / "stopped" / "logs"
    assert "loss" in (logs / "rank-0.log").read_text() and (logs / "rank-1.log").exists()


def test_a_data_error_on_all_ranks_is_told_once(folder: Path) -> None:
    process = train(folder, "nodata", "data.path=none", "--nproc", "2")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    assert out == "" and err.count("error:") == 1 and "none" in err


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_under_other_launchers(folder: Path, launcher: str) -> None:
    steps = ["train.steps=6", "log.every=2"]
    if launcher == "torchrun":
        command = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
        process = train(folder, "torchrun", *steps, launcher=command)
    else:
        (folder / "hosts").write_text("localhost slots=2\n")
        process = train(folder, "deepspeed", "--hostfile", "hosts", *steps, "--format", "json")
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert "data 2" in err
    status = json.loads((folder / launcher / "status.json").read_text())
    assert status["state"] == "finished" and status["step"] == 6
    if launcher == "deepspeed":
        assert json.loads(out) == status  # the launcher's own log is kept off stdout


ALONE = ("train.engine=deepspeed", "parallel.zero=1")


@pytest.mark.parametrize(
    ("ranks", "layout"), [(("0", "1"), ("parallel.tensor=2", "--nproc", "2")), (("",), ALONE)], ids=["two", "alone"]
)
def test_a_rank_leaves_without_taking_its_interpreter_apart(
    folder: Path, tmp_path: Path, ranks: tuple[str, ...], layout: tuple[str, ...]
) -> None:
    """A thread of gloo that lets go of a tensor late would abort it then; exit handlers run all the same."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os\n"
        "path = os.environ['SAYS'] + os.environ.get('RANK', '')\n"
        "def say(word, file=os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), write=os.write):\n"
        "    write(file, word)\n"
        "class Last:\n"
        "    def __del__(self, say=say): say(b'taken apart ')\n"
        "last = Last()\n"
        "atexit.register(say, b'exit handlers ')\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1", "SAYS": str(tmp_path / "rank")}
    command = [sys.executable, "-m", "mlm_cli", "pretrain", "debug/gpt", "data.path=data", "train.steps=6"]
    more = ["--output", str(tmp_path / "run"), "evaluate.every=0", *layout]
    done = subprocess.run([*command, *more], cwd=folder, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert {(tmp_path / f"rank{rank}").read_text() for rank in ranks} == {"exit handlers "}
    if "" not in ranks:  # the supervisor's end is Python's own: the test would notice
        assert "taken apart" in (tmp_path / "rank").read_text()
