"""Real jobs of two ranks in which one hangs, is stopped or dies: code 6, named, with every stack, never a long wait."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "jobs"))
from pretrain_runs import make_recipe, write_data  # noqa: E402

from mlm_cli.config.resolve import write_recipe  # noqa: E402

BODY = """
import os, signal, sys, time
from mlm_cli.config.resolve import resolve_recipe
from mlm_cli.jobs import pretrain
from mlm_cli.launch.rank_log import keep_log
from mlm_cli.models.gpt import GPT
from pathlib import Path
rank = int(os.environ["RANK"])
recipe = resolve_recipe(sys.argv[1])
keep_log(Path(recipe.output) / "logs")
calls = [0]
def watched(real):
    def method(model, batch):
        calls[0] += 1
        if {when}:
            {act}
        return real(model, batch)
    return method
GPT.loss, GPT.scores = watched(GPT.loss), watched(GPT.scores)  # of a step, and of validation
from mlm_cli.cli.failures import exit_code_of
try:
    sys.exit(pretrain.run(recipe))
except Exception as error:
    sys.exit(exit_code_of(error, []))
"""


def job(folder: Path, when: str, act: str, **changes: object) -> tuple[int, str, float, Path]:
    """Exit code, what was said, seconds after the first step, run folder."""
    data, run = write_data(folder / "data"), folder / "run"
    write_recipe(make_recipe(data, run, train__steps=100000, **changes), folder / "recipe.yaml")
    (folder / "rank.py").write_text(textwrap.dedent(BODY).format(when=when, act=act))
    command = [sys.executable, str(folder / "rank.py"), str(folder / "recipe.yaml")]
    code = "import sys; from pathlib import Path; from mlm_cli.launch.local import run_local\n"
    code += f"sys.exit(run_local({command!r}, 2, log_folder=Path({str(run / 'logs')!r})))"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=env)
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    begin = time.monotonic()
    _, err = process.communicate(timeout=60)
    return process.returncode, err, time.monotonic() - begin, run


@pytest.mark.parametrize("layout", [{"tensor": 2}, pytest.param({"zero": 1}, marks=pytest.mark.slow)])
def test_a_hung_rank_is_named_and_all_stacks_are_kept(layout: dict[str, int], tmp_path: Path) -> None:
    code, err, seconds, run = job(
        tmp_path,
        "rank == 1 and calls[0] == 30",
        "time.sleep(300)",
        parallel=layout,
        train__heartbeat=4,
        evaluate__every=0,
    )
    assert code == 6 and seconds < 30, err
    assert re.search(r"error: rank 1 of 2 hangs: no progress for \d+ s, in ", err), err
    for rank in (0, 1):
        said = (run / "logs" / f"rank-{rank}.log").read_text()
        assert "most recent call first" in said
    assert "rank.py" in (run / "logs" / "rank-1.log").read_text()
    status = json.loads((run / "status.json").read_text())
    assert status["exit_code"] == 6 and "rank 1 of 2 hangs" in status["message"]


def test_a_stopped_rank_is_named(tmp_path: Path) -> None:
    act = f"os.kill(os.getpid(), {int(signal.SIGSTOP)})"
    code, err, seconds, _ = job(
        tmp_path, "rank == 1 and calls[0] == 30", act, train__heartbeat=4, evaluate__every=0, parallel={"tensor": 2}
    )
    assert code == 6 and seconds < 30 and "rank 1 of 2 hangs: no sign of life" in err, err


@pytest.mark.parametrize("when", ["not model.training", pytest.param("calls[0] == 30", marks=pytest.mark.slow)])
def test_a_rank_that_dies_ends_the_job_in_time(when: str, tmp_path: Path) -> None:
    act = f"os.kill(os.getpid(), {int(signal.SIGKILL)})"
    code, err, seconds, _ = job(tmp_path, f"rank == 1 and {when}", act, parallel={"tensor": 2}, evaluate__every=3)
    assert code == 6 and seconds < 15 and "rank 1 of 2 was lost" in err and "SIGKILL" in err, err


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_never_joins_ends_the_job(late: int, tmp_path: Path) -> None:
    """It stops before the ranks have met, when nothing watches them yet."""
    body = f"""
    import os, signal, sys
    from mlm_cli import distributed
    from mlm_cli.cli.failures import exit_code_of
    if os.environ["RANK"] == "{late}":
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        distributed.init(timeout_seconds=5)
    except Exception as error:
        sys.exit(exit_code_of(error, []))
    """
    (tmp_path / "rank.py").write_text(textwrap.dedent(body))
    command = [sys.executable, str(tmp_path / "rank.py")]
    code = f"import sys; from mlm_cli.launch.local import run_local; sys.exit(run_local({command!r}, 2))"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 6 and f"rank {late}" in done.stderr and "did not join" in done.stderr, done.stderr
