"""Pretraining BERT on the CPU against transformers' BertForMaskedLM in a plain loop, eager and compiled.

    python benchmarks/bert.py                            # fp32 and bf16: about 4 minutes
    python benchmarks/bert.py --precision bf16 --rounds 9

Post-norm, 6 layers x 384, 128 tokens, vocabulary 30,522, no dropout. The rival may live in another environment:
MLM_BENCH_PYTHON=/path/to/python.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from bert_contenders import HIDDEN, LAYERS, LENGTH, MASKED, VOCAB
from interleave import Worker, interleave, ratio, save
from matrix_rate import product_seconds

HERE = Path(__file__).resolve().parent
CORES = len(os.sched_getaffinity(0))
NAMES = ("mlm", "mlm-again", "transformers", "transformers-compile")


def matrix_seconds(batch: int, precision: str) -> float:
    """Seconds of one step's dense matrix products by themselves, the output layer at the masked places alone."""
    tokens, h, n = batch * LENGTH, HIDDEN, LAYERS
    layers = [(tokens, 3 * h, h, n), (tokens, h, h, n), (tokens, 4 * h, h, n), (tokens, h, 4 * h, n)]
    masked = batch * MASKED
    return product_seconds([*layers, (masked, h, h, 1), (masked, VOCAB, h, 1)], precision)


def compare(batch: int, precision: str, rounds: int, units: int) -> dict[str, Any]:
    """One table: medians, paired ratios, share of the matrix rate."""
    rival_python = os.environ.get("MLM_BENCH_PYTHON", sys.executable)
    workers = [
        Worker(
            name,
            [sys.executable if name.startswith("mlm") else rival_python, str(HERE / "bert_contenders.py"), name,
             "--batch", str(batch), "--precision", precision],
            {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": str(CORES), "HF_HUB_OFFLINE": "1"},
        )
        for name in NAMES
    ]  # fmt: skip
    running = interleave(workers, rounds=rounds, units=units)
    ours = next(worker for worker in running if worker.name == "mlm")
    floor = matrix_seconds(batch, precision)
    print(f"\n{precision}, batch {batch} x {LENGTH}; matrix products alone {floor * 1e3:.1f} ms")
    print(f"  {'':<22}{'ms a step':>10}{'tokens/s':>10}{'of matrix rate':>15}{'mlm is':>9}")
    rows: dict[str, Any] = {}
    for worker in workers:
        if worker.failure:
            print(f"  {worker.name:<22}left out: {worker.failure}")
            rows[worker.name] = {"failure": worker.failure}
            continue
        seconds = statistics.median(worker.times)
        rows[worker.name] = {
            "ms": seconds * 1e3,
            "tokens_per_s": batch * LENGTH / seconds,
            "share_of_matrix_rate": floor / seconds,
            "ratio": ratio(worker, ours),
            "loss": worker.last.get("loss"),
        }
        print(
            f"  {worker.name:<22}{seconds * 1e3:>10.1f}{batch * LENGTH / seconds:>10,.0f}{floor / seconds:>15.0%}"
            f"{rows[worker.name]['ratio']:>8.2f}x"
        )
    return {"batch": batch, "precision": precision, "matrix_ms": floor * 1e3, "contenders": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--units", type=int, default=3, help="steps a turn")
    args = parser.parse_args()
    tables = [compare(args.batch, precision, args.rounds, args.units) for precision in args.precision]
    print(f"\nwritten to {save('bert', {'tables': tables})}")


if __name__ == "__main__":
    main()
