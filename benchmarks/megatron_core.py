"""Tensor slices over two CPU ranks against megatron-core's GPTModel: same shapes, same tokens, gloo on one machine.

    MLM_BENCH_PYTHON=/path/to/other/.venv/bin/python python benchmarks/megatron_core.py

megatron-core wants an environment of its own: `pip install torch` and `pip install --no-deps megatron-core`, packaging
beside it. Each of the two ranks has half of the cores. A step is forward, backward, clipping and AdamW.
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


def compare(precision: str, vocab: int, args: argparse.Namespace) -> dict[str, Any] | None:
    """One row; None where megatron-core does not run."""
    others = os.environ.get("MLM_BENCH_PYTHON", sys.executable)
    workers = [
        Worker(
            name,
            [python, str(HERE / "pretrain_contenders.py"), name, "--vocab", str(vocab), "--batch", str(args.batch),
             "--precision", precision],
            {"PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1"},
        )
        for name, python in (("tensor2", sys.executable), ("megatron-core", others))
    ]  # fmt: skip
    ours, rival = workers
    interleave(workers, rounds=args.rounds, units=args.units)
    if ours.failure or rival.failure:
        print(f"  left out: {ours.failure or rival.failure}", file=sys.stderr)
        return None
    mine, theirs = statistics.median(ours.times), statistics.median(rival.times)
    print(
        f"  {precision:<6}{vocab:>8,}{mine * 1e3:>12.1f} ms{theirs * 1e3:>16.1f} ms{ratio(rival, ours):>9.2f}x"
        f"    losses {ours.last['loss']:.3f}, {rival.last['loss']:.3f}"
    )
    return {
        "precision": precision,
        "vocab": vocab,
        "mlm_ms": mine * 1e3,
        "megatron_core_ms": theirs * 1e3,
        "ratio": ratio(rival, ours),
        "losses": [ours.last["loss"], rival.last["loss"]],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[8192, 50304])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--units", type=int, default=3, help="steps a turn")
    args = parser.parse_args()
    print(f"  {'':<6}{'vocab':>8}{'mlm tensor 2':>15}{'megatron-core':>19}{'mlm is':>10}")
    rows = [compare(precision, vocab, args) for precision in args.precision for vocab in args.vocab]
    found = [row for row in rows if row is not None]
    print(f"\nwritten to {save('megatron_core', {'rows': found})}")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
