"""What a step would cost if all but its matrix products were free."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

_SCRIPT = """
import json, sys, time, torch
products, dtype = json.loads(sys.argv[1]), getattr(torch, sys.argv[2])
def best(run):
    run(); run()
    times = []
    for _ in range(7):
        start = time.perf_counter(); run(); times.append(time.perf_counter() - start)
    return min(times)
total = 0.0
for rows, width, depth, count in products:
    x = torch.randn(rows, depth, dtype=dtype)
    w = torch.randn(width, depth, dtype=dtype)
    g = torch.randn(rows, width, dtype=dtype)
    total += count * (best(lambda: x @ w.t()) + best(lambda: g @ w) + best(lambda: g.t() @ x))
print(total)
"""


def product_seconds(products: Sequence[tuple[int, int, int, int]], precision: str) -> float:
    """Seconds of linear layers alone, forward, input gradient and weight gradient, at these shapes.

    Args:
        products: (rows, outputs, inputs, how many of them); the best of several runs of each counts.
        precision: ``fp32`` or ``bf16``.
    """
    dtype = "bfloat16" if precision == "bf16" else "float32"
    command = [sys.executable, "-c", _SCRIPT, json.dumps([list(product) for product in products]), dtype]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
