"""The job script for Slurm: what it does after each exit code, and two real ranks behind a stand-in for srun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlm_cli.cli.app import run as mlm

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "recipes/slurm/pretrain.sh"
# Starts the ranks of one node as srun does, hands signals on, and ends with the largest of their exit codes.
SRUN = """
import os, signal, subprocess, sys
assert sys.argv[1:3] == ["--kill-on-bad-exit=0", "--wait=300"], sys.argv
ranks = int(os.environ["TASKS"])
def start(rank):
    step = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_STEP_ID": 0, "SLURM_STEP_NUM_TASKS": ranks,
            "SLURM_STEP_TASKS_PER_NODE": ranks}
    return subprocess.Popen(sys.argv[3:], env={**os.environ, **{name: str(value) for name, value in step.items()}})
processes = [start(rank) for rank in range(ranks)]
signal.signal(signal.SIGTERM, lambda number, frame: [process.send_signal(number) for process in processes])
with open(os.environ["SLURM_JOB_ID"] + ".pid", "w") as pid:
    pid.write(str(os.getpid()))
sys.exit(max(process.wait() for process in processes))
"""


def commands(folder: Path, mlm_does: str) -> dict[str, str]:
    """An environment whose srun, scontrol and mlm are stand-ins; scontrol keeps what it was told in ``requeued``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {
        "srun": f"#!{sys.executable}\n{SRUN}",
        "scontrol": f'#!/bin/bash\necho "$@" >> {folder}/requeued\n',
        "mlm": f"#!/bin/bash\n{mlm_does}\n",
    }.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "41", "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize(
    ("code", "losses", "again", "end"),
    [
        (0, 0, False, 0), (1, 0, False, 1), (2, 0, False, 2), (3, 0, False, 3), (5, 0, False, 5), (7, 0, False, 7),
        (130, 0, False, 130), (75, 0, True, 0), (75, 10, True, 0), (6, 0, True, 0), (6, 10, False, 6),
        (137, 9, True, 0), (137, 10, False, 137),
    ],
)  # fmt: skip
def test_what_goes_to_the_queue_again(tmp_path: Path, code: int, losses: int, again: bool, end: int) -> None:
    env = commands(tmp_path / "bin", f'echo "$@" > {tmp_path}/words\nexit {code}')
    env |= {"TASKS": "1", "SLURM_RESTART_COUNT": "99", "SLURM_SUBMIT_DIR": str(tmp_path)}  # most of them after 75
    file = tmp_path / "mlm-41.losses"
    if losses:
        file.write_text("before\n" * losses)
    words = ["bash", str(SCRIPT), "gpt/355m", "data.path=a b"]
    done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True)
    lost = code == 6 or code == 137
    assert (file.read_text().count("\n") if file.exists() else 0) == losses + lost
    requeued = tmp_path / "bin/requeued"
    assert done.returncode == end and requeued.exists() == again, done.stderr
    assert not again or requeued.read_text() == "requeue 41\n"
    assert (tmp_path / "words").read_text() == "pretrain gpt/355m data.path=a b\n"


def test_two_ranks_are_preempted_and_go_on(tmp_path: Path, tiny_text: Path) -> None:
    assert mlm(["preprocess", str(tiny_text), "--tokenizer", "bytes", "--output", str(tmp_path / "corpus"), "-q"]) == 0
    env = commands(tmp_path / "bin", f'exec {sys.executable} -m mlm_cli "$@"')
    env |= {"TASKS": "2", "OMP_NUM_THREADS": "1"}
    words = ["bash", str(SCRIPT), "debug/gpt", "tokenizer=bytes", f"data.path={tmp_path}/corpus", "evaluate.every=0"]
    words += [
        "log.tensorboard=false",
        "log.every=1",
        "schedule.warmup_steps=0",
        "--output",
        str(tmp_path / "run"),
        "train.global_batch_size=8",
    ]
    job = subprocess.Popen(
        [*words, "train.steps=100000"], env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run/metrics.jsonl"
    while job.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        time.sleep(0.1)
    if job.poll() is None:
        os.kill(int((tmp_path / "41.pid").read_text()), signal.SIGTERM)  # what Slurm sends to the step
    _, talk = job.communicate(timeout=120)
    assert job.returncode == 0 and (tmp_path / "bin/requeued").read_text() == "requeue 41\n", talk
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["exit_code"] == 75 and status["step"] >= 2
    words.append(f"train.steps={status['step'] + 2}")
    done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "resuming" in done.stderr, done.stderr
    again = json.loads((tmp_path / "run/status.json").read_text())
    assert (again["exit_code"], again["step"]) == (0, status["step"] + 2)
    assert (tmp_path / "bin/requeued").read_text() == "requeue 41\n"  # once


def test_the_script_is_at_hand(capsys: pytest.CaptureFixture[str]) -> None:
    assert mlm(["recipe", "ls", "slurm/"]) == 0
    assert capsys.readouterr().out.startswith("slurm/pretrain.sh  Pretraining on Slurm that goes on by itself")
    assert mlm(["recipe", "show", "slurm/pretrain.sh"]) == 0
    assert capsys.readouterr().out.strip() == SCRIPT.read_text().strip()
    assert mlm(["recipe", "show", "slurm/pretrain.sh", "--resolved"]) == 2
