"""Pretraining on the CPU against transformers.Trainer, litgpt and a plain PyTorch loop (eager and compiled).

    python benchmarks/pretrain.py                     # all shapes and precisions: about 10 minutes
    python benchmarks/pretrain.py --vocab 8192 --precision bf16 --rounds 5

Rivals that are not installed are left out and named. They may live in another environment (litgpt and Trainer want
their own versions of things): MLM_BENCH_PYTHON=/path/to/python.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from interleave import Worker, interleave, ratio, save
from matrix_rate import product_seconds

HERE = Path(__file__).resolve().parent
LAYERS, HIDDEN, LENGTH = 6, 384, 256
CORES = len(os.sched_getaffinity(0))
OURS = ("mlm", "mlm-again")
RIVALS = {
    "fp32": ("plain", "compile", "litgpt", "trainer"),
    "bf16": ("plain", "compile", "litgpt", "litgpt-true", "trainer"),
}


def matrix_flops(vocab: int, batch: int) -> float:
    """Floating-point operations of the matrix products of one step: forward and twice that backward, attention's
    two products over the whole square (as Megatron counts: Narayanan et al. 2021, equation 3, without recompute)."""
    rows = batch * LENGTH
    dense = LAYERS * 12 * HIDDEN**2 + vocab * HIDDEN
    return 6.0 * rows * (dense + LAYERS * 2 * LENGTH * HIDDEN)


def matrix_seconds(vocab: int, batch: int, precision: str) -> float:
    """Seconds that the dense matrix products of one step take by themselves, at the very same shapes."""
    rows, h, n = batch * LENGTH, HIDDEN, LAYERS
    layers = [(rows, 3 * h, h, n), (rows, h, h, n), (rows, 4 * h, h, n), (rows, h, 4 * h, n)]
    return product_seconds([*layers, (rows, vocab, h, 1)], precision)


def compare(vocab: int, batch: int, precision: str, rounds: int, units: int, names: list[str]) -> dict[str, Any]:
    """One table: medians, paired ratios, share of the matrix rate."""
    rival_python = os.environ.get("MLM_BENCH_PYTHON", sys.executable)
    workers = [
        Worker(
            name,
            [sys.executable if name in (*OURS, "plain", "compile") else rival_python,
             str(HERE / "pretrain_contenders.py"), name, "--vocab", str(vocab), "--batch", str(batch),
             "--precision", precision],
            {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": str(CORES), "HF_HUB_OFFLINE": "1"},
        )
        for name in names
    ]  # fmt: skip
    running = interleave(workers, rounds=rounds, units=units)
    ours = next(worker for worker in running if worker.name == "mlm")
    floor = matrix_seconds(vocab, batch, precision)
    rate = matrix_flops(vocab, batch)
    print(f"\n{precision}, vocabulary {vocab:,}, batch {batch} x {LENGTH}; matrix products alone {floor * 1e3:.1f} ms")
    print(f"  {'':<14}{'ms a step':>10}{'tokens/s':>10}{'GFLOP/s':>9}{'of matrix rate':>15}{'mlm is':>9}")
    rows = {}
    for worker in workers:
        if worker.failure:
            print(f"  {worker.name:<14}left out: {worker.failure}")
            rows[worker.name] = {"failure": worker.failure}
            continue
        seconds = statistics.median(worker.times)
        rows[worker.name] = {
            "ms": seconds * 1e3,
            "tokens_per_s": batch * LENGTH / seconds,
            "share_of_matrix_rate": floor / seconds,
            "ratio": ratio(worker, ours),
            "spread": [min(worker.times) * 1e3, max(worker.times) * 1e3],
            "loss": worker.last.get("loss"),
        }
        print(
            f"  {worker.name:<14}{seconds * 1e3:>10.1f}{batch * LENGTH / seconds:>10,.0f}{rate / seconds / 1e9:>9,.0f}"
            f"{floor / seconds:>15.0%}{rows[worker.name]['ratio']:>8.2f}x"
        )
    return {"vocab": vocab, "batch": batch, "precision": precision, "matrix_ms": floor * 1e3, "contenders": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[8192, 50304])
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--units", type=int, default=5, help="steps a turn")
    parser.add_argument("--only", nargs="*", help="of the rivals")
    args = parser.parse_args()
    tables = []
    for precision in args.precision:
        rivals = [name for name in RIVALS[precision] if args.only is None or name in args.only]
        names = [*OURS, *rivals]
        for vocab in args.vocab:
            tables += [compare(vocab, batch, precision, args.rounds, args.units, names) for batch in args.batch]
    print(f"\nwritten to {save('pretrain', {'tables': tables})}")


if __name__ == "__main__":
    main()
