"""One command that checks everything on a GPU: ``make gpu-check``, meant to take under 8 minutes from a bare checkout.

    python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --only tests,step      # some stages; those it knows are named by --help

Builds the operators for this device; runs the GPU tests, ``compute-sanitizer`` over a few of them, the operator
benchmark, steps of a GPT of 1.3 billion parameters with their model FLOPs utilisation, sparse attention, and a short
`mlm pretrain`. Prints a table and writes ``benchmarks/results/gpu_check.json``; the exit code is 0 only if every stage
passed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from interleave import save

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Stage:
    """What one stage did. ``passed`` is None when it was skipped."""

    name: str
    passed: bool | None
    seconds: float
    note: str


def run(name: str, command: list[str], *, timeout: float, env: dict[str, str] | None = None) -> tuple[Stage, str]:
    print(f"== {name}: {' '.join(command)}", file=sys.stderr, flush=True)
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
        )
        passed, text = done.returncode == 0, done.stdout
    except subprocess.TimeoutExpired as late:
        passed, text = False, f"{late.stdout or ''}\nstopped after {timeout:.0f} s"
    lines = [line for line in text.strip().splitlines() if line.strip()]
    if not passed:
        print("\n".join(lines[-40:]), file=sys.stderr)
    return Stage(name, passed, time.monotonic() - start, lines[-1] if lines else ""), text


def build() -> Stage:
    import torch

    major, minor = torch.cuda.get_device_capability()
    stage, _ = run(
        "build",
        [sys.executable, "-m", "mlm_cli.ops.build", "--cuda", "on"],
        timeout=300,
        env={"TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")},
    )
    return stage


def tests() -> Stage:
    several = ["-n", "6"] if importlib.util.find_spec("xdist") else []
    return run("GPU tests", [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *several, "tests/gpu"], timeout=240)[0]


def sanitizer() -> Stage:
    """Memory and race checks of our kernels in a few tests, side by side."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).is_file():
        return Stage("compute-sanitizer", None, 0.0, "not installed")
    some = ["-m", "pytest", "-q", "-x", "tests/gpu", "-p", "no:cacheprovider"]
    some += ["-k", "(70 or 1000 or 257 or 1003 or 65537) and (bfloat16 or adamw)"]
    ours = ["--kernel-name", "kernel_substring=mlm"]
    with ThreadPoolExecutor(2) as pool:
        found = list(
            pool.map(
                lambda check: run(
                    f"compute-sanitizer {check}",
                    [tool, f"--tool={check}", "--error-exitcode=9", *ours, sys.executable, *some],
                    timeout=150,
                    env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                )[0],
                ("memcheck", "racecheck"),
            )
        )
    note = "; ".join(f"{stage.name.split()[1]}: {stage.note}" for stage in found)
    passed = all(stage.passed for stage in found)
    return Stage("compute-sanitizer", passed, max(stage.seconds for stage in found), note)


def benchmark() -> Stage:
    command = [sys.executable, "benchmarks/ops.py", "--device", "cuda", "--big", "512", "--rounds", "5"]
    stage, text = run("operators", command, timeout=240)
    print(text, flush=True)
    return stage


def step() -> Stage:
    """Steps of GPT 1.3B beside a plain loop."""
    stage, text = run("step of GPT 1.3B", [sys.executable, "benchmarks/gpu_pretrain.py"], timeout=200)
    print(text, flush=True)
    return stage


def sparse() -> Stage:
    lengths = ["4096", "16384", "32768", "65536"]
    command = [sys.executable, "benchmarks/sparse_attention.py", "--device", "cuda", "--dtype", "bf16", "--rounds", "5"]
    stage, text = run("sparse attention", [*command, "--lengths", *lengths], timeout=100)
    print(text, flush=True)
    stage.note = text.strip().splitlines()[-2].strip() if stage.passed else stage.note
    return stage


def pretrain() -> Stage:
    """A short run of GPT 355M by the command, with its checkpoint; ``metrics.jsonl`` ends with the figures."""
    folder = ROOT / "runs" / "gpu-check"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    text = folder / "text.jsonl"
    sources = sorted((ROOT / "mlm_cli").rglob("*.py"))
    text.write_text("".join(json.dumps({"text": path.read_text()}) + "\n" for path in sources) * 40)
    mlm = [sys.executable, "-m", "mlm_cli"]
    data = folder / "data"
    prepared, _ = run(
        "preprocess", [*mlm, "preprocess", str(text), "--tokenizer", "bytes", "--output", str(data)], timeout=120
    )
    if not prepared.passed:
        return prepared
    keys = {
        "data.path": data,
        "tokenizer": "bytes",
        "train.steps": 60,
        "schedule.warmup_steps": 5,
        "train.micro_batch_size": 16,
        "train.global_batch_size": 16,
        "log.every": 20,
        "evaluate.every": 0,
    }
    overrides = [f"{key}={value}" for key, value in keys.items()]
    command = [*mlm, "pretrain", "gpt/355m", "-o", str(folder / "run"), *overrides]
    stage, _ = run("pretrain GPT 355M", command, timeout=200, env={"MLM_DEVICE": "cuda"})
    metrics = folder / "run" / "metrics.jsonl"
    last = json.loads(metrics.read_text().splitlines()[-1]) if metrics.is_file() else {}
    figures = {key: last[key] for key in ("loss", "tokens_per_s", "tflops", "mfu") if last.get(key) is not None}
    stage.note = ", ".join(f"{key} {value:.4g}" for key, value in figures.items()) or stage.note
    shutil.rmtree(folder, ignore_errors=True)  # gigabytes
    return stage


STAGES = {
    "build": build,
    "tests": tests,
    "operators": benchmark,
    "step": step,
    "sanitizer": sanitizer,
    "sparse": sparse,
    "pretrain": pretrain,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(STAGES), help="stages, by commas: " + ", ".join(STAGES))
    wanted = parser.parse_args().only.split(",")
    if unknown := [name for name in wanted if name not in STAGES]:
        parser.error(f"no stage `{unknown[0]}`; there are {', '.join(STAGES)}")
    import torch

    if not torch.cuda.is_available():
        print(
            "error: torch sees no CUDA device\nhint: run this on a machine with a GPU and a CUDA build of torch",
            file=sys.stderr,
        )
        return 2
    stages: list[Stage] = []
    for name in wanted:
        stages.append(STAGES[name]())
        print(f"== {name} took {stages[-1].seconds:.0f} s", file=sys.stderr, flush=True)
        if name == "build" and not stages[-1].passed:
            break
    for stage in stages:
        word = {True: "ok", False: "FAILED", None: "skipped"}[stage.passed]
        print(f"{stage.name:<20} {word:<8} {stage.seconds:6.0f} s  {stage.note}")
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    report = {"device": device, "torch": torch.__version__, "stages": [asdict(stage) for stage in stages]}
    print(save("gpu_check", report), file=sys.stderr)
    return 0 if all(stage.passed is not False for stage in stages) else 1


if __name__ == "__main__":
    sys.exit(main())
