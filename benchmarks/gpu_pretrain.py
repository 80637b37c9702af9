"""A training step of a GPT of 1.3 billion parameters on one GPU: tokens a second and MFU, against a plain torch loop.

    python benchmarks/gpu_pretrain.py                  # about 2 minutes; part of `make gpu-check`
    python benchmarks/gpu_pretrain.py --no-compile     # without torch.compile of the plain loop: half of that

24 layers x 2048, 16 heads, sequences of 2,048 tokens, 8 of them a step, vocabulary 50,257, no dropout, AdamW, gradients
clipped at 1. Ours is what `mlm pretrain` builds for ``train.precision=bf16``: bfloat16 weights with float32 masters.
The rivals are nanoGPT's model as a user would write it, under bfloat16 autocast with float32 weights and torch's fused
AdamW, as it is and through ``torch.compile``. All take turns in one process on the same random tokens; a ratio is the
median over rounds. MFU is model FLOP/s by Megatron-LM's formula (Narayanan et al. 2021, equation 3, without
recomputation) over the data sheet's dense bfloat16 rate.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import pretrain_contenders
import torch
from interleave import save

from mlm_cli import distributed, ops
from mlm_cli.config.schema import ModelSection
from mlm_cli.models.count import flops_per_token
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.training.metrics import find_peak

VOCAB = 50257
Step = Callable[[], torch.Tensor]


def section(args: argparse.Namespace) -> ModelSection:
    return ModelSection(
        num_layers=args.layers, hidden_size=args.hidden, num_attention_heads=args.heads, seq_length=args.length,
        vocab_size=VOCAB, make_vocab_size_divisible_by=1024,
    )  # fmt: skip


def ours(args: argparse.Namespace, rows: torch.Tensor) -> Step:
    parallel = ParallelContext.create(device=rows.device)
    step = pretrain_contenders.mlm_step(section(args), parallel, torch.bfloat16, args.batch)
    return lambda: step([rows])


def plain(args: argparse.Namespace, rows: torch.Tensor, *, compiled: bool) -> Step:
    shape = {"LAYERS": args.layers, "HIDDEN": args.hidden, "HEADS": args.heads, "LENGTH": args.length}
    vars(pretrain_contenders).update(shape)
    with rows.device:
        model = pretrain_contenders.PlainGPT(-(-VOCAB // 1024) * 1024)
    step = pretrain_contenders.plain_step(model, compiled=compiled, bf16=True)
    return lambda: step(rows)


def seconds(step: Step, steps: int) -> tuple[float, float]:
    """(seconds a step, last loss); reading the loss waits for the device."""
    start = time.perf_counter()
    for _ in range(steps):
        loss = float(step())
    return (time.perf_counter() - start) / steps, loss


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="of one turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    device = distributed.pick_device()
    rows = torch.randint(0, VOCAB, (args.batch, args.length + 1), generator=torch.Generator().manual_seed(0)).to(device)
    makers: dict[str, Callable[[], Step]] = {
        "mlm": lambda: ours(args, rows),
        "plain": lambda: plain(args, rows, compiled=False),
    }
    if not args.no_compile:
        makers["compile"] = lambda: plain(args, rows, compiled=True)
    steps, memory, failed = {}, {}, {}
    for name, make in makers.items():
        torch.cuda.reset_peak_memory_stats() if device.type == "cuda" else None
        try:
            step = make()
            seconds(step, 2)
        except torch.OutOfMemoryError as failure:  # a rival's needs are its own; ours must fit
            if name == "mlm":
                raise
            failed[name] = str(failure).splitlines()[0]
            continue
        steps[name] = step
        memory[name] = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
        print(f"# {name} is ready", file=sys.stderr, flush=True)
    times: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, float] = {}
    for number in range(args.rounds):
        order = list(steps.items())
        for name, step in order if number % 2 == 0 else order[::-1]:
            taken, losses[name] = seconds(step, args.steps)
            times[name].append(taken)
    tokens = args.batch * args.length
    per_token = flops_per_token(section(args), args.length)
    peak = find_peak(device, torch.bfloat16)
    report: dict[str, Any] = {}
    for name, taken in times.items():
        middle = statistics.median(taken)
        flops = tokens * per_token / middle
        report[name] = {
            "ms": middle * 1e3,
            "tokens_per_s": tokens / middle,
            "tflops": flops / 1e12,
            "mfu": flops / peak.flops if peak.flops else None,
            "ratio": statistics.median(theirs / mine for theirs, mine in zip(taken, times["mlm"], strict=True)),
            "memory_gb": memory[name],
            "loss": losses[name],
        }
        mfu = f"{report[name]['mfu']:.1%}" if peak.flops else "-"
        print(
            f"{name:<8} {middle * 1e3:8.1f} ms/step  {tokens / middle:9,.0f} tokens/s  {flops / 1e12:6.0f} TFLOP/s  "
            f"MFU {mfu:>6}  {report[name]['ratio']:.2f}x our time  loss {losses[name]:.3f}"
        )
    setting = {**vars(args), "peak": peak.source, "kernels": ops.status()[0]["reason"], "failed": failed}
    for name, why in failed.items():
        print(f"{name:<8} did not run: {why}")
    print(
        f"# {save('gpu_pretrain', {'torch': torch.__version__, 'setting': setting, 'rows': report})}", file=sys.stderr
    )
    best = report["mlm"]
    print(f"mfu {best['mfu'] or 0:.3f}, tokens/s {best['tokens_per_s']:.0f}, tflops {best['tflops']:.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
