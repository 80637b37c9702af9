"""The demo: from the Python source on this machine to a talking GPT, with the plain `mlm` commands.

Run by ``make demo``. Everything it writes goes to ``demo/``. Needs nothing but the standard library and `mlm`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import resource
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "demo"
MLM = Path(sys.executable).parent / "mlm"
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"}
HELD_OUT_SHARE = 0.02
PROMPT = "def read_lines(path):\n"


def collect() -> tuple[bytes, int]:
    """Write every library source to train.jsonl or, chosen by a hash of its name, to heldout.jsonl.

    Returns the held-out text in one piece, for the compressors, and the number of training bytes.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    held_out, training_bytes = [], 0
    with (
        open(WORK / "train.jsonl", "w", encoding="utf-8") as train,
        open(WORK / "heldout.jsonl", "w", encoding="utf-8") as held,
    ):
        for folder, names, files in os.walk(library):
            names[:] = sorted(set(names) - SKIPPED_FOLDERS)
            for name in sorted(files):
                path = Path(folder, name)
                if path.suffix != ".py" or not path.is_file():
                    continue
                raw = path.read_bytes()
                try:
                    text = raw.decode("utf-8")
                except UnicodeDecodeError:
                    continue
                if not text.strip():
                    continue
                where = path.relative_to(library).as_posix()
                row = json.dumps({"text": text, "path": where}) + "\n"
                if int(hashlib.sha256(where.encode()).hexdigest()[:8], 16) < HELD_OUT_SHARE * 2**32:
                    held.write(row)
                    held_out.append(raw)
                else:
                    train.write(row)
                    training_bytes += len(raw)
    return b"".join(held_out), training_bytes


def mlm(stage: str, times: dict[str, float], *arguments: str, capture: bool = False) -> str:
    """Show and run one command; stop the demo with its exit code when it fails."""
    print(f"\n$ mlm {shlex.join(arguments)}", flush=True)
    start = time.perf_counter()
    done = subprocess.run([str(MLM), *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE if capture else None)
    times[stage] = time.perf_counter() - start
    if done.returncode:
        print(f"the command failed with exit code {done.returncode}", file=sys.stderr)
        sys.exit(done.returncode)
    return done.stdout or ""


def run_stages(times: dict[str, float]) -> tuple[dict[str, float], str]:
    """The five verbs. Returns the measures of the held-out files and a sample."""
    mlm("tokenizer", times, "tokenizer", "train", "demo/train.jsonl", "--kind", "bpe", "--vocab-size", "8192",
        "--output", "demo/tokenizer")  # fmt: skip
    mlm("preprocess", times, "preprocess", "demo/train.jsonl", "--tokenizer", "demo/tokenizer", "--output",
        "demo/data/stdlib", "--workers", "2")  # fmt: skip
    mlm("pretrain", times, "pretrain", "demo/stdlib", "--nproc", "2")
    mlm("evaluate", times, "evaluate", "demo/run", "--task", "perplexity", "--data", "demo/heldout.jsonl",
        "--stride", "256", "--output", "demo/evaluation")  # fmt: skip
    results = json.loads((WORK / "evaluation" / "results.json").read_text())["results"]["perplexity"]
    sample = mlm("generate", times, "generate", "demo/run", "--prompt", PROMPT, "--max-new-tokens", "120",
                 "--temperature", "0.7", "--top-p", "0.9", "--seed", "7", capture=True)  # fmt: skip
    return results, sample


def tokens_per_second() -> float:
    """Median over the logged steps, without the first tenth."""
    rows = [json.loads(line) for line in (WORK / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = sorted(row["tokens_per_s"] for row in rows[len(rows) // 10 :] if row.get("tokens_per_s"))
    return rates[len(rates) // 2]


def report(held_out: bytes, results: dict[str, float], times: dict[str, float], sample: str) -> None:
    """The closing table: the model beside general compressors on the same bytes, and where the time went."""

    def bits(compressed: bytes) -> float:
        return 8 * len(compressed) / len(held_out)

    print(f"\n{'held-out source, ' + format(len(held_out), ',') + ' bytes':<36}{'bits per byte':>14}")
    print(f"{'  gzip -9':<36}{bits(gzip.compress(held_out, 9)):>14.3f}")
    print(f"{'  xz -9':<36}{bits(lzma.compress(held_out, preset=9)):>14.3f}")
    print(f"{'  this GPT (each file by itself)':<36}{results['bits_per_byte,none']:>14.3f}")
    print(f"\n{'held-out loss (nats a token)':<36}{results['loss,none']:>14.3f}")
    print(f"{'training tokens a second':<36}{tokens_per_second():>14,.0f}")
    print(f"{'largest process, MB':<36}{resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:>14,.0f}")
    for stage, seconds in times.items():
        print(f"{'  ' + stage + ', seconds':<36}{seconds:>14.1f}")
    print(f"{'  in all':<36}{sum(times.values()):>14.1f}")
    print(f"\nA sample, from {PROMPT.strip()!r}:\n\n{sample.rstrip()}")


def main() -> None:
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir()
    times: dict[str, float] = {}
    start = time.perf_counter()
    held_out, training_bytes = collect()
    times["collect"] = time.perf_counter() - start
    print(f"{training_bytes:,} bytes of Python source to train on, {len(held_out):,} held out")
    results, sample = run_stages(times)
    report(held_out, results, times, sample)


if __name__ == "__main__":
    main()
