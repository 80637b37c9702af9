"""Generation of one text on the CPU with the same weights in float32, bfloat16 and int8, in turns.

    python benchmarks/int8.py                                       # three sizes of model, one thread: some minutes
    python benchmarks/int8.py --model runs/llama --threads 1 2      # a model of one's own

Memory is the most that a process has had, reading the model included. `int8` is what `mlm convert --dtype int8` makes
of float32; its other weights are float32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from generate import HERE, TimedWorker, work_mlm
from interleave import interleave, ratio, save

FORMS = ("fp32", "bf16", "int8")
SIZES = {"6 x 384": (6, 384), "12 x 768": (12, 768), "16 x 1024": (16, 1024)}
CONTEXT = 256


def make_source(folder: Path, size: str, vocab: int) -> None:
    """A random Llama-style model."""
    from mlm_cli.checkpoint.hub import save_model_folder
    from mlm_cli.config.schema import ModelSection
    from mlm_cli.models.registry import build_model
    from mlm_cli.parallel.context import ParallelContext

    layers, hidden = SIZES[size]
    section = ModelSection(
        num_layers=layers, hidden_size=hidden, num_attention_heads=hidden // 64, seq_length=CONTEXT, vocab_size=vocab,
        position="rotary", norm="rmsnorm", activation="swiglu", bias=False,
    )  # fmt: skip
    save_model_folder(build_model(section, ParallelContext.single(), seed=1), folder)


def compare(model: str | None, size: str, vocab: int, threads: int, rounds: int, tokens: int) -> dict[str, Any]:
    """One row: for each form milliseconds a token, size on the disk and memory; ratios to float32."""
    from mlm_cli.jobs import convert

    with tempfile.TemporaryDirectory() as scratch:
        if model is None:
            make_source(Path(scratch) / "source", size, vocab)
        source = model or f"{scratch}/source"
        reports = [
            convert.run(convert.ConvertRequest(source, f"{scratch}/{form}", "mlm", dtype=form)) for form in FORMS
        ]
        env = {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        workers = [
            TimedWorker(
                form,
                [sys.executable, __file__, "--worker", f"{scratch}/{form}/model", "--vocab", str(vocab)],
                env,
            )
            for form in FORMS
        ]
        running = interleave(workers, rounds=rounds, units=tokens)
    for worker in workers:
        if worker.failure is not None:
            sys.exit(f"{worker.name} did not start: {worker.failure}")
    plain = running[0]
    return {
        "model": model or size,
        "threads": threads,
        "parameters": reports[0]["parameters"],
        "disk_mb": [report["files"]["model/model.safetensors"] / 1e6 for report in reports],
        "ms_per_token": [1e3 * statistics.median(worker.times) for worker in running],
        "cpu_ms_per_token": [1e3 * statistics.median(worker.processor) for worker in running],
        "times_fp32": [ratio(plain, worker) for worker in running],
        "cpu_times_fp32": [
            statistics.median(a / b for a, b in zip(plain.processor, worker.processor, strict=True))
            for worker in running
        ],
        "peak_mb": [worker.last["peak_mb"] for worker in running],
    }


def show(rows: list[dict[str, Any]]) -> None:
    print("model        threads  form  on disk MB  peak MB  ms/token  tokens/s  x fp32  x fp32 (processor time)")
    for row in rows:
        for i, form in enumerate(FORMS):
            milliseconds = row["ms_per_token"][i]
            cells = [
                f"{row['model'][-12:]:<12} {row['threads']:>7}  {form}  {row['disk_mb'][i]:>10.1f}",
                f"{row['peak_mb'][i]:>7.0f}  {milliseconds:>8.2f}  {1e3 / milliseconds:>8.1f}",
                f"{row['times_fp32'][i]:>6.2f}  {row['cpu_times_fp32'][i]:>6.2f}",
            ]
            print("  ".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a MODEL instead of random ones")
    parser.add_argument("--size", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--vocab", type=int, default=8192, help="of random models, or fewer than the MODEL has")
    parser.add_argument("--threads", type=int, nargs="*", default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=192, help="of an answer to 32 tokens")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work_mlm(given.worker, given.vocab, 1)
        return
    sizes = given.size if given.model is None else [given.model]
    rows = [
        compare(given.model, size, given.vocab, threads, given.rounds, given.tokens)
        for threads in given.threads
        for size in sizes
    ]
    show(rows)
    print(f"written to {save('int8', {'forms': FORMS, 'rows': rows})}", file=sys.stderr)


if __name__ == "__main__":
    main()
