"""Serving on the CPU: many askers at once against `transformers serve`, on the same model folder.

    python benchmarks/serve.py                          # 1 and 8 askers: about 5 minutes
    python benchmarks/serve.py --askers 16 --hidden 768 --layers 12 --rounds 3

Each asker sends one request after the other over HTTP (``/v1/completions``, greedy, no end of text before the length
asked for, lengths from 16 to 64 tokens), and the time counts until the last has its answer. The servers wait while
another has its turn. `transformers serve` runs as it comes and with ``--continuous-batching``; it may live in another
environment (transformers[serving], accelerate): MLM_BENCH_PYTHON=/path/to/python.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from interleave import Worker, interleave, ratio, save, serve

HERE = Path(__file__).resolve().parent
REQUESTS = 3  # of an asker in a turn
SENTENCE = "The quick brown fox jumps over the lazy dog, and number {} of the others looks on from afar."
SERVERS = {
    "mlm": ["-m", "mlm_cli", "generate", "{folder}", "--serve", "--port", "{port}", "--batch-size", "{askers}"],
    "transformers": ["-m", "transformers.cli.transformers", "serve", "{folder}", "--port", "{port}"],
    "transformers, continuous": [
        "-m", "transformers.cli.transformers", "serve", "{folder}", "--port", "{port}", "--continuous-batching",
    ],
}  # fmt: skip


def make_folder(folder: Path, args: argparse.Namespace) -> None:
    """A random GPT-2 that never ends its text, and a byte-level tokenizer with as many tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([SENTENCE.format(n) for n in range(50)], trainer)
    tokenizer.add_tokens([f"<{n}>" for n in range(args.vocab - tokenizer.get_vocab_size())])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=args.vocab, n_positions=512, n_embd=args.hidden, n_layer=args.layers, n_head=args.hidden // 64,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    GPT2LMHeadModel(config).to(torch.bfloat16 if args.precision == "bf16" else torch.float32).save_pretrained(folder)


def ask(address: str, model: str, number: int) -> dict[str, Any]:
    """One request; lengths differ from one to the next."""
    body = {
        "model": model, "prompt": SENTENCE.format(number), "max_tokens": 16 + 16 * (number % 4), "temperature": 0,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as reply:
        answer = json.loads(reply.read())
    return {"text": answer["choices"][0]["text"], "tokens": answer["usage"]["completion_tokens"]}


def work(args: argparse.Namespace) -> None:
    """A worker: one server, and those who ask it when it is its turn."""
    from mlm_cli.launch.local import free_port

    port = free_port()
    values = {"folder": args.folder, "port": port, "askers": args.askers}
    python = sys.executable if args.worker == "mlm" else os.environ.get("MLM_BENCH_PYTHON", sys.executable)
    command = [python, *(word.format(**values) for word in SERVERS[args.worker])]
    server = subprocess.Popen(command, stdout=sys.stderr)
    address = f"http://127.0.0.1:{port}"
    model = Path(args.folder).name if args.worker == "mlm" else args.folder
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                if server.poll() is not None:
                    sys.exit(f"error: {args.worker} ended with code {server.returncode}")
                time.sleep(0.1)
        with ThreadPoolExecutor(args.askers) as pool:

            def turn(units: int) -> dict[str, Any]:
                count = units * args.askers * REQUESTS
                answers = list(pool.map(lambda number: ask(address, model, number), range(count)))
                return {"tokens": sum(a["tokens"] for a in answers), "texts": [a["text"] for a in answers[:8]]}

            turn(1)
            serve(turn)
    finally:
        server.terminate()
        server.wait(timeout=30)


def compare(askers: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        make_folder(folder, args)
        env = {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
        workers = [
            Worker(
                name,
                [sys.executable, __file__, "--worker", name, "--folder", str(folder), "--askers", str(askers)],
                env,
            )
            for name in SERVERS
        ]
        running = interleave(workers, rounds=args.rounds, units=1)
    if not running or running[0].name != "mlm":
        sys.exit(f"error: mlm did not start: {workers[0].failure}")
    rows = []
    for worker in workers:
        if worker.failure:
            print(f"  {worker.name:<26}left out: {worker.failure}", file=sys.stderr)
            continue
        seconds = statistics.median(worker.times)
        rate, slower = worker.last["tokens"] / seconds, ratio(worker, running[0])
        texts, ours = worker.last["texts"], running[0].last["texts"]
        same = sum(a == b for a, b in zip(texts, ours, strict=True))
        figures = f"{rate:>9.0f} tokens/s   mlm is {slower:>5.2f}x   same texts: {same} of {len(texts)}"
        print(f"  {askers:>6}  {worker.name:<26}{figures}")
        rows.append({"askers": askers, "server": worker.name, "tokens_per_second": rate, "ratio": slower, "same": same})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--askers", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", choices=list(SERVERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        args.askers = args.askers[0]
        work(args)
        return 0
    rows = [row for askers in args.askers for row in compare(askers, args)]
    print(f"\nwritten to {save('serve', {'rows': rows})}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
