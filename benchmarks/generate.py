"""Generation of one text (greedy, or by beam search) on the CPU against `transformers` generate, on the same folder.

    python benchmarks/generate.py                       # both vocabularies and precisions: about 4 minutes
    python benchmarks/generate.py --vocab 8192 --precision bf16 --threads 1 --rounds 5
    python benchmarks/generate.py --beams 4 --vocab 8192 --threads 2

The memory roof is the time that reading every weight once takes at the rate of a copy of as many bytes, measured here
in the same run: no decoder that reads its weights once a token can be faster. (Weights that fit the caches are read
at the rate of the caches, by the copy too.)
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interleave import Worker, interleave, ratio, save, serve

HERE = Path(__file__).resolve().parent
LAYERS, HIDDEN, CONTEXT, PROMPT = 6, 384, 512, 32
NAMES = ("mlm", "mlm-again", "transformers")


@dataclass
class TimedWorker(Worker):
    """Also keeps processor time, which other programs on the machine disturb less than wall time."""

    processor: list[float] = field(default_factory=list)

    def turn(self, units: int) -> float:
        seconds = super().turn(units)
        self.processor.append(float(self.last["processor"]) / units)
        return seconds


def make_folder(folder: Path, vocab: int, precision: str) -> int:
    """A random GPT-2 of the benchmark's shape, as `transformers` saves it. Returns bytes of weights read a token."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab, n_positions=CONTEXT, n_embd=HIDDEN, n_layer=LAYERS, n_head=HIDDEN // 64,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    model.save_pretrained(folder)
    positions = model.transformer.wpe.weight
    return sum(p.numel() * p.element_size() for p in model.parameters() if p is not positions)


def prompt_ids(vocab: int) -> list[int]:
    return [(37 * i + 11) % vocab for i in range(PROMPT)]


def peak_mb() -> float:
    """The most memory this process has had (getrusage would count what its parent had when it was started)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM")), 0.0)


def work_mlm(folder: str, vocab: int, beams: int) -> None:
    """The generator as the command runs it, down to the text; ids stand for text, as there is no tokenizer."""
    import torch

    from mlm_cli.checkpoint.hub import load_model_folder, read_model_config
    from mlm_cli.generation.answer import EncodedPrompt, Settings
    from mlm_cli.generation.answerer import decoder_of, make_answerer
    from mlm_cli.generation.prompts import Prompt
    from mlm_cli.generation.sampling import Sampling
    from mlm_cli.generation.text_stream import TextStream
    from mlm_cli.parallel.context import ParallelContext

    class Ids(TextStream):
        def feed(self, token: int) -> str:
            return f"{token} "

        def flush(self) -> str:
            return ""

    _, config = read_model_config(Path(folder))
    dtype = torch.bfloat16 if config.values.get("dtype") == "bfloat16" else torch.float32
    model, _ = load_model_folder(folder, ParallelContext.single(), dtype=dtype, keep_int8=True)
    decoder = decoder_of(model.eval(), 1, Settings(Sampling(temperature=0), beams=beams), start_id=None)
    prompt = EncodedPrompt(Prompt(0, "", 0, ""), prompt_ids(vocab))

    def work(count: int) -> dict[str, Any]:
        begin = time.process_time()
        answerer = make_answerer(decoder, Settings(Sampling(temperature=0), count, beams=beams), Ids)
        (answer,) = answerer.answers([prompt])
        spent = time.process_time() - begin
        return {"tokens": answer.tokens, "processor": spent, "peak_mb": peak_mb()}

    work(16)
    serve(work)


def work_transformers(folder: str, vocab: int, beams: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    ids = torch.tensor([prompt_ids(vocab)])
    mask = torch.ones_like(ids)

    def work(count: int) -> dict[str, Any]:
        begin = time.process_time()
        out = model.generate(
            ids, attention_mask=mask, do_sample=False, num_beams=beams, max_new_tokens=count, pad_token_id=0
        )
        return {"tokens": out[0, PROMPT:].tolist(), "processor": time.process_time() - begin}

    work(16)
    serve(work)


def copy_rate(num_bytes: int, threads: int) -> float:
    """Bytes a second moved (read and written) by copying ``num_bytes``; the best of many runs."""
    script = f"""
import time, torch
torch.set_num_threads({threads})
source = torch.ones({num_bytes}, dtype=torch.uint8)
target = torch.zeros_like(source)
times = []
for _ in range(30):
    start = time.perf_counter(); target.copy_(source); times.append(time.perf_counter() - start)
print(2 * {num_bytes} / min(times))
"""
    return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


def compare(vocab: int, precision: str, threads: int, rounds: int, tokens: int, beams: int) -> dict[str, Any]:
    """One row: milliseconds a token, paired ratios, share of the memory roof."""
    with tempfile.TemporaryDirectory() as scratch:
        weight_bytes = make_folder(Path(scratch), vocab, precision)
        env = {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        arguments = ["--folder", scratch, "--vocab", str(vocab), "--beams", str(beams)]
        workers = [TimedWorker(name, [sys.executable, __file__, "--worker", name, *arguments], env) for name in NAMES]
        running = interleave(workers, rounds=rounds, units=tokens)
    for worker in workers:
        if worker.failure is not None:
            sys.exit(f"{worker.name} did not start: {worker.failure}")
    ours, again, theirs = running
    rate = copy_rate(weight_bytes, threads)
    same = next(
        (n for n, (a, b) in enumerate(zip(ours.last["tokens"], theirs.last["tokens"], strict=True)) if a != b), tokens
    )
    milliseconds = {worker.name: 1e3 * statistics.median(worker.times) for worker in running}
    return {
        "vocab": vocab,
        "precision": precision,
        "threads": threads,
        "beams": beams,
        "ms_per_token": milliseconds,
        "ratio": ratio(theirs, ours),
        "self_ratio": ratio(again, ours),
        "processor_ratio": statistics.median(a / b for a, b in zip(theirs.processor, ours.processor, strict=True)),
        "weight_mb": weight_bytes / 1e6,
        "copy_gb_per_s": rate / 1e9,
        "roof_share": weight_bytes / rate * 1e3 / milliseconds["mlm"],
        "equal_tokens": same,
        "tokens": tokens,
    }


def show(rows: list[dict[str, Any]]) -> None:
    way = "greedy" if rows[0]["beams"] == 1 else f"{rows[0]['beams']} beams"
    print(f"GPT {LAYERS} x {HIDDEN}, prompt {PROMPT} tokens, {way}, batch 1")
    heads = "vocab  prec  threads  mlm ms/tok  transformers  ratio  self  cpu ratio"
    print(f"{heads}  weights MB  copy GB/s  of roof  equal tokens")
    for row in rows:
        times = row["ms_per_token"]
        cells = [
            f"{row['vocab']:>5}  {row['precision']}  {row['threads']:>7}  {times['mlm']:>10.2f}",
            f"{times['transformers']:>12.2f}  {row['ratio']:>5.2f}  {row['self_ratio']:.2f}",
            f"{row['processor_ratio']:>9.2f}  {row['weight_mb']:>10.1f}",
            f"{row['copy_gb_per_s']:>9.1f}  {row['roof_share']:>7.0%}  {row['equal_tokens']}/{row['tokens']}",
        ]
        print("  ".join(cells))


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="*", default=[8192, 50304])
    parser.add_argument("--precision", nargs="*", default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, nargs="*", default=sorted({1, cores}))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--beams", type=int, default=1, help="of a beam search; 1: greedy")
    parser.add_argument("--worker", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        (work_transformers if given.worker == "transformers" else work_mlm)(given.folder, given.vocab[0], given.beams)
        return
    rows = [
        compare(vocab, precision, threads, given.rounds, given.tokens, given.beams)
        for threads in given.threads
        for vocab in given.vocab
        for precision in given.precision
    ]
    show(rows)
    print(f"written to {save('generate', {'rows': rows})}", file=sys.stderr)


if __name__ == "__main__":
    main()
