"""The program as a user meets it: real processes, exit codes, what goes to stdout and to stderr, what it imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "numpy", "deepspeed", "datasets", "rich", "pydantic", "tokenizers")


def mlm(
    *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None, **how: object
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlm_cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        **{"stdin": subprocess.DEVNULL, **how},  # type: ignore[call-overload]
    )


def fails(code: int, *arguments: str, **how: object) -> list[str]:
    """Lines of stderr of a command that must fail with ``code`` and say nothing on stdout."""
    done = mlm(*arguments, **how)  # type: ignore[arg-type]
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error: ") and any(line.startswith("hint: ") for line in lines), done.stderr
    assert "Traceback" not in done.stderr
    return lines


def test_help_is_data_and_names_every_verb() -> None:
    done = mlm("--help")
    assert done.returncode == 0 and done.stderr == ""
    for verb in ("preprocess", "tokenizer", "pretrain", "finetune", "evaluate", "generate", "plan", "recipe", "doctor"):
        assert f"\n  {verb} " in done.stdout


def test_no_verb_is_a_usage_error() -> None:
    done = mlm()
    assert done.returncode == 2 and done.stdout == "" and "Usage: mlm" in done.stderr


def test_version() -> None:
    assert mlm("--version").stdout.startswith("mlm 0.")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["pretrian"],
        ["plan", "--help"],
        ["generate", "--help"],
        ["pretrain", "--lr", "3"],
        ["plan", "gpt/355n"],
        ["pretrain", "gpt/355m", "train.stepz=1"],
    ],
)
def test_help_and_usage_errors_import_nothing_heavy(arguments: list[str]) -> None:
    """What keeps the answer quick; how quick is measured by ``benchmarks/startup.py``."""
    code = (
        "import sys; from mlm_cli.cli.app import run; run(sys.argv[1:]);"
        f"sys.stderr.write('LOADED ' + ' '.join(name for name in {HEAVY!r} if name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    loaded = done.stderr.partition("LOADED ")[2].split()
    allowed = {"pydantic"} if "=" in arguments[-1] or "gpt" in arguments[-1] or "--lr" in arguments else set()
    assert set(loaded) <= allowed


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["pretrian"], "no such command `pretrian`", "mlm pretrain"),
        (["frobnicate"], "no such command `frobnicate`", "mlm --help"),
        (["--quiet", "plan"], "no such option `--quiet` before the verb", "VERB"),
        (["plan"], "no recipe given", "mlm plan debug/gpt"),
        (["plan", "gpt/355n"], "no built-in recipe or file `gpt/355n`", "`gpt/355m`"),
        (["plan", "./none.yaml"], "no recipe file `./none.yaml`", "mlm recipe ls"),
        (["plan", "gpt/355m", "gpt/1.2b"], "two recipes", "RECIPE"),
        (["plan", "gpt/355m", "--recipe", "gpt/1.2b"], "two recipes", "RECIPE"),
        (["plan", "gpt/355m", "fast"], "not KEY=VALUE", "RECIPE"),
        (["plan", "gpt/355m", "--nprok", "3"], "no such option: --nprok", "`--nproc`"),
        (["plan", "gpt/355m", "--nproc", "none"], "`--nproc`", "mlm plan --help"),
        (["plan", "gpt/355m", "--nproc", "0"], "`--nproc`", "mlm plan --help"),
        (["plan", "gpt/355m", "--format", "xml"], "`--format`", "mlm plan --help"),
        (["plan", "gpt/355m", "-q", "-v"], "exclude each other", "one of them"),
        (["plan", "gpt/355m", "--device-tflops", "-1"], "above 0", "H100"),
        (["pretrain", "gpt/355m", "--lr", "1"], "no such option: --lr", "`optimizer.lr=VALUE`"),
        (["pretrain", "debug/gpt", "data.path=x", "parallel.tensor=2"], "needs 2 ranks", "`--nproc 2`"),
        (["pretrain", "debug/gpt", "data.path=x", "--hostfile", "no/hosts"], "no/hosts", "--hostfile"),
        (["finetune", "debug/gpt"], "2 mistakes", "schema"),
        (["evaluate", "--task", "perplexity"], "no model given", "MODEL"),
        (["evaluate", "runs/x"], "no task given", "--task perplexity"),
        (["evaluate", "x", "--task", "embedding", "evaluate.max_length=9"], "is not for embedding", "task.max_length"),
        (["evaluate", "runs/x", "--task", "perplexity", "none.txt"], "`none.txt` is neither", "--task A --task B"),
        (["evaluate", "runs/x", "--task", "a", "task.textcolumn=1"], "`task.textcolumn`", "`task.text_column`"),
        (["generate"], "no model given", "--prompt"),
        (["generate", "m", "--prompt", "a", "--prompts", "b"], "exclude each other", "one of them"),
        (["generate", "m", "--prompt", "a", "--top-p", "0"], "`generate.top_p` must be greater than 0", "schema"),
        (["recipe", "shwo"], "shwo", "show"),
        (["recipe", "show"], "no recipe given", "debug/gpt"),
    ],
)
def test_usage_errors(arguments: list[str], error: str, hint: str, tmp_path: Path) -> None:
    lines = fails(2, *arguments, cwd=tmp_path)
    assert error in lines[0], lines
    assert hint in "\n".join(lines[1:]), lines
    assert list(tmp_path.iterdir()) == []  # nothing was started


def test_json_is_exactly_one_document() -> None:
    for arguments in (
        ["plan", "gpt/8.3b", "--nproc", "512", "--device-tflops", "125"],
        ["recipe", "ls"],
        ["recipe", "show", "gpt/8.3b"],
        ["recipe", "check", "gpt/8.3b"],
        ["recipe", "schema"],
        ["pretrain", "debug/gpt", "data.path=x", "parallel.tensor=2", "--nproc", "2", "--dry-run"],
        ["evaluate", "m", "--task", "perplexity", "--data", "x", "--dry-run"],
        ["generate", "m", "--prompt", "a", "--nproc", "2", "--dry-run"],
    ):
        done = mlm(*arguments, "--format", "json")
        assert done.returncode == 0, done.stderr
        json.loads(done.stdout)


def test_plan_numbers_reach_the_user() -> None:
    plan = json.loads(mlm("plan", "gpt/8.3b", "--nproc", "512", "--format", "json").stdout)
    assert plan["parameters"] == 8317040640 and plan["batch"]["data_parallel_size"] == 64
    text = mlm("plan", "gpt/8.3b").stdout
    assert "8,317,040,640" in text and "8 = tensor 8 x pipeline 1 x data 1" in text


def test_dry_run_starts_nothing_and_says_what_it_would(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    done = mlm("pretrain", "debug/gpt", "data.path=x", "--nproc", "2", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0 and "2 ranks" in done.stdout and "mlm_cli pretrain" in done.stdout
    done = mlm("pretrain", "debug/gpt", "data.path=x", "--hostfile", "hosts", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0 and "deepspeed.launcher.runner --hostfile=hosts" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["hosts"]


def test_evaluate_request_from_flags_recipe_and_keys(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    done = mlm(
        "evaluate", "m", "a.txt", "--data", "b.txt", "--recipe", "evaluate/perplexity", "--stride", "7", "--seed", "5",
        "task.label_column=2", "train.precision=fp32", "evaluate.max_length=9", "--dry-run", "--format", "json",
        cwd=tmp_path,
    )  # fmt: skip
    request = json.loads(done.stdout)["request"]
    assert request["tasks"] == ["perplexity"] and request["stride"] == 7 and request["seed"] == 5
    assert request["data"] == [str(tmp_path / "b.txt"), str(tmp_path / "a.txt")]
    assert request["task_keys"] == [["label_column", 2]] and request["precision"] == "fp32"
    assert request["max_length"] == 9


def test_generate_slices_over_all_ranks_unless_told_otherwise() -> None:
    def tensor(*more: str) -> int:
        done = mlm("generate", "m", "--prompt", "a", "--dry-run", "--format", "json", *more)
        return int(json.loads(done.stdout)["request"]["tensor"])

    assert (tensor(), tensor("--nproc", "2"), tensor("--nproc", "2", "parallel.tensor=1")) == (1, 2, 1)


def test_a_broken_pipe_is_no_bug() -> None:
    command = f"{sys.executable} -m mlm_cli recipe schema --format json | head -c 10; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.stderr == ""
    assert done.stdout.endswith("141\n") or done.stdout.endswith("0\n")  # 0: all fit into the pipe


def test_a_full_disk_is_exit_code_7() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mlm_cli", "recipe", "ls"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    assert done.returncode == 7 and "disk is full" in done.stderr and "Traceback" not in done.stderr


def test_recipe_show_prints_what_can_be_used_again(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(mlm("recipe", "show", "debug/llama").stdout)
    assert mlm("recipe", "check", "my.yaml", cwd=tmp_path).returncode == 0
    assert mlm("recipe", "show", "debug/llama", "seed=3", "-o", "all.yaml", cwd=tmp_path).returncode == 0
    shown = json.loads(mlm("recipe", "show", "all.yaml", "--format", "json", cwd=tmp_path).stdout)
    assert shown["seed"] == 3 and shown["model"]["norm"] == "rmsnorm"


def test_colours_never_reach_a_pipe_nor_stdout() -> None:
    for arguments in (["doctor"], ["plan", "--help"], ["pretrian"]):
        done = mlm(*arguments, env={"NO_COLOR": "1", "FORCE_COLOR": "0"})
        assert "\x1b[" not in done.stdout + done.stderr


def test_doctor_reports_without_failing() -> None:
    report = json.loads(mlm("doctor", "--format", "json").stdout)
    assert report["packages"]["torch"] and report["cpu"]["cores"] >= 1
    assert {kernel["backend"] for kernel in report["kernels"]} <= {"cuda", "cpu", "reference"}
    assert all(kernel["reason"] for kernel in report["kernels"])
    for item in report["optional"]:
        assert (item["version"] is None) == (item["install"] is not None)
    assert "layer_norm" in mlm("doctor").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "perplexty", "--data", "x"], "did you mean `perplexity`?"),
        (["--task", "perplexity"], "perplexity needs text"),
    ],
)
def test_evaluate_needs_no_model_to_see_a_wrong_command(arguments: list[str], message: str) -> None:
    said = "\n".join(fails(2, "evaluate", "runs/none", *arguments))
    assert message in said


SIGNALLED = """
import os, signal, sys, time
from mlm_cli.cli import app
def verb_app(verb):  # what takes seconds
    os.kill(os.getpid(), getattr(signal, sys.argv[2]))
    time.sleep(5)
app.verb_app = verb_app
sys.exit(app.run([sys.argv[1]]))
"""


@pytest.mark.parametrize(
    ("verb", "name", "code"),
    [
        ("pretrain", "SIGTERM", 75),
        ("finetune", "SIGUSR1", 75),
        ("pretrain", "SIGINT", 130),
        ("convert", "SIGTERM", -15),
    ],
)
def test_a_signal_before_training_begins_asks_to_be_requeued(verb: str, name: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, verb, name],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == code and "Traceback" not in done.stderr
    assert ("SIGTERM: stopped before there was" in done.stderr) == (code == 75 and name == "SIGTERM")
