"""One command that checks everything on a GPU: ``make gpu-check``, under 8 minutes on one device from a bare checkout.

    python benchmarks/gpu_check.py [--skip-sanitizer] [--skip-train]

Builds the CUDA operators for this device, runs the GPU tests, ``compute-sanitizer`` over a few of them, the operator
benchmark and a short pretraining run with its model FLOPs utilisation. Prints a table and writes
``benchmarks/results/gpu_check.json``; the exit code is 0 only if every stage passed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
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
    return run("GPU tests", [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"], timeout=240)[0]


def sanitizer() -> Stage:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).is_file():
        return Stage("compute-sanitizer", None, 0.0, "not installed")
    some = ["-m", "pytest", "-q", "-x", "tests/gpu", "-k", "(70 or 1000 or 257 or 1003) and bfloat16 or adamw"]
    worst: Stage | None = None
    for check in ("memcheck", "racecheck"):
        command = [tool, f"--tool={check}", "--error-exitcode=9", sys.executable, *some]
        stage, _ = run(f"compute-sanitizer {check}", command, timeout=180, env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        if worst is None or not stage.passed:
            worst = Stage(
                "compute-sanitizer", stage.passed, stage.seconds + (worst.seconds if worst else 0), stage.note
            )
    assert worst is not None
    return worst


def benchmark() -> Stage:
    command = [sys.executable, "benchmarks/ops.py", "--device", "cuda", "--big", "512", "--rounds", "5"]
    stage, text = run("operators", command, timeout=300)
    print(text, flush=True)
    return stage


def train() -> tuple[Stage, dict[str, object]]:
    """A few steps of GPT 355M on generated tokens; the last line of ``metrics.jsonl`` has tokens/s and MFU."""
    folder = ROOT / "runs" / "gpu-check"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    text = folder / "text.jsonl"
    sources = sorted((ROOT / "mlm_cli").rglob("*.py"))
    text.write_text("".join(json.dumps({"text": path.read_text()}) + "\n" for path in sources) * 40)
    mlm = [sys.executable, "-m", "mlm_cli"]
    prepared, _ = run(
        "preprocess",
        [*mlm, "preprocess", str(text), "--tokenizer", "bytes", "--output", str(folder / "data")],
        timeout=120,
    )
    if not prepared.passed:
        return prepared, {}
    keys = {
        "data.path": folder / "data",
        "tokenizer": "bytes",
        "train.steps": 60,
        "schedule.warmup_steps": 5,
        "train.micro_batch_size": 8,
        "train.global_batch_size": 8,
        "log.every": 20,
        "evaluate.every": 0,
    }
    command = [
        *mlm,
        "pretrain",
        "gpt/355m",
        "-o",
        str(folder / "run"),
        *(f"{key}={value}" for key, value in keys.items()),
    ]
    stage, _ = run("pretrain", command, timeout=240, env={"MLM_DEVICE": "cuda"})
    metrics = folder / "run" / "metrics.jsonl"
    last = json.loads(metrics.read_text().splitlines()[-1]) if metrics.is_file() else {}
    figures = {key: last[key] for key in ("loss", "tokens_per_s", "tflops", "mfu") if key in last}
    stage.note = ", ".join(f"{key} {value:.4g}" for key, value in figures.items() if value is not None) or stage.note
    return stage, figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-sanitizer", action="store_true")
    parser.add_argument("--skip-train", action="store_true")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print(
            "error: torch sees no CUDA device\nhint: run this on a machine with a GPU and a CUDA build of torch",
            file=sys.stderr,
        )
        return 2
    stages = [build()]
    figures: dict[str, object] = {}
    if stages[0].passed:
        stages += [tests(), benchmark()]
        if not args.skip_train:
            stage, figures = train()
            stages.append(stage)
        if not args.skip_sanitizer:
            stages.append(sanitizer())
    for stage in stages:
        word = {True: "ok", False: "FAILED", None: "skipped"}[stage.passed]
        print(f"{stage.name:<20} {word:<8} {stage.seconds:6.0f} s  {stage.note}")
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    report = {
        "device": device,
        "torch": torch.__version__,
        "stages": [asdict(stage) for stage in stages],
        "train": figures,
    }
    print(save("gpu_check", report), file=sys.stderr)
    return 0 if all(stage.passed is not False for stage in stages) else 1


if __name__ == "__main__":
    sys.exit(main())
