"""Run every CPU benchmark one after the other: ``make bench``, about half an hour on two quiet cores.

    python benchmarks/run.py             # all
    python benchmarks/run.py ops pretrain

Each prints its table and leaves ``benchmarks/results/NAME.json`` with machine, date and command.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BENCHMARKS = {
    "startup": ["startup.py"],
    "preprocess": ["preprocess.py"],
    "ops": ["ops.py"],
    "pretrain": ["pretrain.py"],
    "layouts": ["layouts.py"],
    "bert": ["bert.py"],
    "generate": ["generate.py"],
    "serve": ["serve.py"],
    "checkpoint": ["checkpoint.py"],
    "megatron_core": ["megatron_core.py"],
    "sparse_attention": ["sparse_attention.py"],
}


def main() -> int:
    wanted = sys.argv[1:] or list(BENCHMARKS)
    unknown = [name for name in wanted if name not in BENCHMARKS]
    if unknown:
        print(f"error: no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    failed = []
    for name in wanted:
        print(f"\n== {name}", flush=True)
        if subprocess.run([sys.executable, str(HERE / BENCHMARKS[name][0]), *BENCHMARKS[name][1:]]).returncode:
            failed.append(name)
    if failed:
        print(f"error: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
