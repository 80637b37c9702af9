"""How long the command line takes to answer: help, usage errors, recipe errors, a plan.

    python benchmarks/startup.py

The rivals are the interpreter itself doing nothing, and `torchrun --help`, which imports torch.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from interleave import save

MLM = [sys.executable, "-m", "mlm_cli"]
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "mlm --help": [*MLM, "--help"],
    "mlm preprocess --help": [*MLM, "preprocess", "--help"],
    "mlm pretrian (unknown verb)": [*MLM, "pretrian"],
    "mlm pretrain --bad-flag": [*MLM, "pretrain", "--bad-flag"],
    "mlm pretrain with an unknown key": [*MLM, "pretrain", "debug/gpt", "model.layers=3"],
    "mlm plan gpt/8.3b": [*MLM, "plan", "gpt/8.3b", "--nproc", "8"],
    "torchrun --help": [sys.executable, "-m", "torch.distributed.run", "--help"],
}


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(8):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first fills the disk cache
    for name, seconds in medians.items():
        print(f"  {name:<36}{seconds:>7.3f} s")
    print(f"written to {save('startup', {'median_seconds': medians})}")


if __name__ == "__main__":
    main()
