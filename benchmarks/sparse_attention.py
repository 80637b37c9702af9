"""Sparse attention against dense `scaled_dot_product_attention`, forward and backward: time and memory to 32k tokens.

    python benchmarks/sparse_attention.py                     # CPU: about 6 minutes on two quiet cores
    python benchmarks/sparse_attention.py --pattern bigbird --dtype bf16
    python benchmarks/sparse_attention.py --device cuda       # FlexAttention against torch's flash attention

Both take turns in one process; a ratio is the median over rounds of dense time / sparse time in that round. The dense
rival is causal too, and skips what causality hides. Memory is the peak of a process of its own that does one pass,
less what it held before. A target missed is marked with ``!``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from interleave import save

from mlm_cli import ops
from mlm_cli.training.allocator import keep_freed_memory

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
TARGETS = {4096: 3.0, 16384: 10.0}  # local, window 512, float32, CPU
Work = Callable[[], None]


def contenders(args: argparse.Namespace, length: int) -> dict[str, Work]:
    """One forward and backward pass of each."""
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    shape = (1, args.heads, length, args.head_dim)
    make = torch.Generator(args.device).manual_seed(0)
    query, key, value, grad = (torch.randn(shape, dtype=dtype, device=args.device, generator=make) for _ in range(4))
    inputs = [x.requires_grad_() for x in (query, key, value)]
    pattern = ops.SparsePattern(
        args.pattern, block=args.block, window=args.window, global_tokens=args.block, length=length
    )

    def step(attend: Callable[[], torch.Tensor]) -> Work:
        def work() -> None:
            for x in inputs:
                x.grad = None
            attend().backward(grad)
            if args.device == "cuda":
                torch.cuda.synchronize()

        return work

    causal = not args.both_ways

    def sparse() -> torch.Tensor:
        if ops.serves_flex(query, None):
            return ops.flex_sparse_attention(*inputs, pattern, causal=causal)
        return ops.sparse_attention(*inputs, pattern, causal=causal)

    return {"sparse": step(sparse), "dense": step(lambda: F.scaled_dot_product_attention(*inputs, is_causal=causal))}


def seconds(work: Work, clock: Callable[[], float]) -> float:
    start = clock()
    work()
    return clock() - start


def peak_bytes(name: str, args: argparse.Namespace, length: int) -> int:
    """Of one pass in a fresh process."""
    if args.device == "cuda":
        work = contenders(args, length)[name]
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - held
    command = [sys.executable, *sys.argv, "--probe", name, str(length)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(json.loads(answer)["bytes"])


def probe(args: argparse.Namespace) -> None:
    """What the process of ``peak_bytes`` does: warm up at a small length, then count one pass."""
    name, length = args.probe[0], int(args.probe[1])
    contenders(args, 256)[name]()
    work = contenders(args, length)[name]
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what is held now
    before = _status("VmRSS")
    work()
    print(json.dumps({"bytes": _status("VmHWM") - before}))


def _status(key: str) -> int:
    """Bytes, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measure(args: argparse.Namespace, length: int) -> dict[str, Any]:
    works = contenders(args, length)
    for work in works.values():
        work()
    rounds = args.rounds if length <= 8192 else max(3, args.rounds // 3)
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds):
        order = list(works.items())
        for name, work in order if number % 2 == 0 else order[::-1]:
            times[name].append(seconds(work, time.process_time if args.processor_time else time.perf_counter))
    ratio = statistics.median(d / s for d, s in zip(times["dense"], times["sparse"], strict=True))
    spread = statistics.median(times["sparse"]) / min(times["sparse"])
    return {
        "tokens": length,
        **{f"{name}_ms": statistics.median(values) * 1e3 for name, values in times.items()},
        "ratio": ratio,
        "noise": spread,
        **{f"{name}_mb": peak_bytes(name, args, length) / 1e6 for name in works},
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--pattern", default="local")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--both-ways", action="store_true", help="not causal, as in an encoder")
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--processor-time", action="store_true", help="seconds of the processor, for a machine that is shared"
    )
    parser.add_argument("--probe", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.probe:
        probe(args)
        return 0
    if args.device == "cpu":
        keep_freed_memory()
    ours = args.device == "cpu" and args.pattern == "local" and args.window == 512 and args.dtype == "fp32"
    print("  tokens   dense ms  sparse ms   ratio  dense MB  sparse MB   (sparse: median / best)")
    rows = []
    for length in args.lengths:
        row = measure(args, length)
        rows.append(row)
        mark = "!" if ours and row["ratio"] < TARGETS.get(length, 0) else " "
        print(
            f"{length:>8}{row['dense_ms']:>11.1f}{row['sparse_ms']:>11.1f}{row['ratio']:>7.2f}x{mark}"
            f"{row['dense_mb']:>9.1f}{row['sparse_mb']:>11.1f}   {row['noise']:.2f}",
            flush=True,
        )
    setting = {key: value for key, value in vars(args).items() if key != "probe"}
    name = "sparse_attention" if args.device == "cpu" else "sparse_attention_cuda"
    print(f"written to {save(name, {'torch': torch.__version__, 'setting': setting, 'rows': rows})}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
