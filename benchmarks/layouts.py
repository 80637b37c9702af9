"""Two CPU ranks with half of the cores each against one rank with all: tensor, data and pipeline slices of one model.

    python benchmarks/layouts.py                          # micro-batches of 8 x 256; 1 a step, and 8 for the pipeline
    python benchmarks/layouts.py --precision bf16 --rounds 5

A ratio over 1: the two ranks are faster.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from interleave import Worker, interleave, ratio, save

HERE = Path(__file__).resolve().parent
# By micro-batches of a step: with one of them a pipeline has nothing to overlap, and ZeRO nothing but its update.
CASES = {1: ("tensor2", "tensor2-sequence", "data2", "data2-zero1"), 8: ("pipeline2", "data2-zero1")}


def compare(micro_batches: int, precision: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one table; the first is one rank against itself."""
    cores = str(len(os.sched_getaffinity(0)))
    workers = [
        Worker(
            name,
            [sys.executable, str(HERE / "pretrain_contenders.py"), name, "--vocab", str(args.vocab), "--batch",
             str(args.batch), "--precision", precision, "--micro-batches", str(micro_batches)],
            {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": cores, "HF_HUB_OFFLINE": "1"},
        )
        for name in ("mlm", "mlm-again", *CASES[micro_batches])
    ]  # fmt: skip
    one = workers[0]
    interleave(workers, rounds=args.rounds, units=max(1, args.units // micro_batches))
    if one.failure:
        print(f"  {precision:<6}{micro_batches:>6}  no rank to compare with: {one.failure}", file=sys.stderr)
        return []
    rows = []
    for worker in workers:
        if worker.failure:
            print(f"  {worker.name:<14}left out: {worker.failure}", file=sys.stderr)
            continue
        faster, milliseconds = 1 / ratio(worker, one), statistics.median(worker.times) * 1e3
        print(f"  {precision:<6}{micro_batches:>6}  {worker.name:<14}{milliseconds:>10.1f} ms{faster:>8.2f}x")
        rows.append(
            {
                "precision": precision,
                "micro_batches": micro_batches,
                "layout": worker.name,
                "ms": milliseconds,
                "ratio": faster,
                "loss": worker.last["loss"],
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=8, help="rows of a micro-batch, over all data ranks")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--units", type=int, default=5, help="micro-batches a turn, at least one step")
    args = parser.parse_args()
    print(f"  {'':<6}{'micro':>6}  {'':<14}{'a step':>13}{'faster':>9}")
    rows = [row for precision in args.precision for number in CASES for row in compare(number, precision, args)]
    print(f"\nwritten to {save('layouts', {'rows': rows})}")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
