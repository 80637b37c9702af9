"""The fused operators against torch's own, the eager chain and torch.compile of it, forward and backward.

    python benchmarks/ops.py                      # CPU: about 6 minutes on two quiet cores
    python benchmarks/ops.py --only norm --no-compile     # part of the table; saves nothing
    python benchmarks/ops.py --device cuda        # part of `make gpu-check`

All contenders work in turns in one process; a ratio is the median over rounds of rival time / our time in that round.
``roof``: bytes that must move / our time, as a share of the bandwidth of ``copy_`` of a tensor of the same size,
measured in the same rounds (``clone``, which also pays for fresh memory, is in the JSON; on a GPU it is the yardstick).
The allocator keeps freed memory, as in training (mlm_cli/training/allocator.py); ``--fresh-memory`` leaves it as glibc
has it. ``self`` is ours against ours: its distance from 1 is the noise. A target missed is marked with ``!``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from interleave import save
from ops_cases import Case, Maker, cases, gpu_cases

from mlm_cli import ops
from mlm_cli.training.allocator import keep_freed_memory

Work = Callable[[], object]


def seconds(work: Work, repeats: int, cuda: bool) -> float:
    """Wall time of one call."""
    if cuda:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


def bandwidth_probe(case: Case, device: str) -> tuple[Work, Work, float]:
    """``copy_`` and ``clone`` of a tensor of the case's size, and the bytes they move."""
    source = torch.zeros(case.shape, dtype=case.dtype, device=device)
    if device == "cuda":
        source.normal_()  # zeros move faster on some
    target = torch.zeros_like(source)
    moved = 2.0 * source.numel() * source.element_size()
    return lambda: target.copy_(source), lambda: source.clone(), moved


def measure(case: Case, *, rounds: int, device: str) -> dict[str, object]:
    cuda = device == "cuda"
    copy, clone, copied = bandwidth_probe(case, device)
    contenders: dict[str, Work] = {"ours": case.ours, "self": case.ours, **case.rivals, "copy_": copy, "clone": clone}
    for name, work in list(contenders.items()):  # warm up: compile, touch memory
        try:
            work()
            work()
        except Exception as failure:
            if name not in case.rivals:
                raise
            print(f"# {name} cannot do {case.operator} of {case.shape}: {str(failure)[:80]}", file=sys.stderr)
            del contenders[name], case.rivals[name]
    repeats = max(1, int((0.004 if cuda else 0.03) / max(seconds(case.ours, 2, cuda), 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        order = list(contenders.items())
        for name, work in order if number % 2 == 0 else order[::-1]:
            times[name].append(seconds(work, repeats, cuda))
    ours = times["ours"]
    ratios = {
        name: statistics.median(theirs / mine for theirs, mine in zip(times[name], ours, strict=True))
        for name in ("self", *case.rivals)
    }
    yardstick = times["clone" if cuda else "copy_"]
    roof = statistics.median(
        (case.bytes_moved / mine) / (copied / theirs) for mine, theirs in zip(ours, yardstick, strict=True)
    )
    return {
        "operator": case.operator,
        "shape": list(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "milliseconds": statistics.median(ours) * 1e3,
        "ratios": ratios,
        "roof": roof,
        "copy_gb_per_s": copied / statistics.median(times["copy_"]) / 1e9,
        "clone_gb_per_s": copied / statistics.median(times["clone"]) / 1e9,
        "targets": case.target,
        "missed": [n for n, wanted in case.target.items() if (roof if n == "roof" else ratios.get(n, wanted)) < wanted],
    }


def line(row: dict[str, object]) -> str:
    shape = "x".join(str(n) for n in row["shape"])  # type: ignore[attr-defined]
    rivals = "  ".join(
        f"{name} {value:.2f}x{'!' if name in row['missed'] else ''}"  # type: ignore[operator]
        for name, value in row["ratios"].items()  # type: ignore[attr-defined]
        if name != "self"
    )
    roof = f"{row['roof']:.0%}{'!' if 'roof' in row['missed'] else ''}"  # type: ignore[operator]
    name = f"{row['operator']:<15} {row['dtype']:<9} {shape:<18}"
    return f"{name} {row['milliseconds']:9.3f} ms  roof {roof:>5}  self {row['ratios']['self']:.2f}  {rivals}"  # type: ignore[index]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--big", type=int, default=256, help="MB of one tensor of the big shapes")
    parser.add_argument("--only", default="", help="part of an operator's name")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--no-small", action="store_true", help="leave out the small shapes")
    parser.add_argument("--fresh-memory", action="store_true", help="leave the allocator as it is")
    return parser.parse_args()


def main() -> int:
    args = parse()
    torch.manual_seed(0)
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    kept = not args.fresh_memory and keep_freed_memory()
    backend = ops.status()[0]
    if backend["backend"] != args.device:
        print(f"error: no {args.device} kernels: {backend['reason']}", file=sys.stderr)
        return 1
    print(f"# {backend['reason']}; torch {torch.__version__}, {args.threads} threads", file=sys.stderr)
    maker = Maker(args.device, not args.no_compile)
    rows = []
    if args.device == "cuda":
        listed = gpu_cases(maker, big_bytes=args.big << 20, only=args.only)
    else:
        listed = cases(maker, big_bytes=args.big << 20, small=not args.no_small, only=args.only)
    for make in listed:
        rows.append(measure(make(), rounds=args.rounds, device=args.device))
        print(line(rows[-1]), flush=True)
    missed = sum(bool(row["missed"]) for row in rows)
    print(f"# {len(rows)} measured, {missed} below target")
    name = "ops" if args.device == "cpu" else "ops_cuda"
    saved = save(
        name, {"torch": torch.__version__, "keeps_freed_memory": kept, "kernels": backend["reason"], "rows": rows}
    )
    print(f"# {saved}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
