"""What a watermark costs and what it is worth: tokens a second, share of answers found by length, perplexity.

    python benchmarks/watermark.py runs/gpt --text novel.txt

Prompts are pieces of ``--text``; the ways take turns, speeds are medians. Perplexity is that of the same model, without
the mark, for the answers alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from interleave import save
from repetition import pieces

from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.evaluation.watermark import Detector, count_green
from mlm_cli.generation.watermark import USUAL_CONTEXT, Watermark

KEY = 1234577291
WAYS = {
    "no mark": ("lefthash", 0.0),
    "control": ("lefthash", 0.0),
    "bias 1": ("lefthash", 1.0),
    "bias 2": ("lefthash", 2.0),
    "bias 4": ("lefthash", 4.0),
    "selfhash, bias 2": ("selfhash", 2.0),
}


def mlm(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MARK": str(KEY)}
    command = [sys.executable, "-m", "mlm_cli", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment)


def perplexity(model: str, texts: list[str], scratch: Path) -> float:
    file = scratch / "answers.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    done = mlm("evaluate", model, "--task", "perplexity", "--data", str(file), "--format", "json", "-q")
    return json.loads(done.stdout)["results"]["perplexity"]["token_perplexity,none"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=[25, 50, 100, 200])
    given = parser.parse_args()
    prompts, _ = pieces(Path(given.text).read_text(encoding="utf-8"), given.prompts, 24, 0)
    tokens, tokenizer = max(given.lengths), load_tokenizer(given.model)
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "prompts.jsonl"
        file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
        options = ["--prompts", str(file), "--format", "json", "--max-new-tokens", str(tokens)]
        options += ["--batch-size", str(given.batch_size), "generate.watermark_key=env:MARK"]
        speeds: dict[str, list[float]] = {way: [] for way in WAYS}
        answers: dict[str, list[str]] = {}
        for _ in range(given.rounds):
            for way, (scheme, bias) in WAYS.items():
                mark = [f"generate.watermark_scheme={scheme}", f"generate.watermark_bias={bias}"]
                done = mlm("generate", given.model, *options, *mark)
                answers[way] = [json.loads(line)["text"] for line in done.stdout.splitlines()]
                found = re.search(r"(\d+) tokens in ([\d.]+) s", done.stderr)
                assert found is not None
                speeds[way].append(int(found[1]) / float(found[2]))
        for way, (scheme, _) in WAYS.items():
            mark = Watermark(KEY, scheme=scheme, context=USUAL_CONTEXT[scheme])
            ids = [tokenizer.encode(text) for text in answers[way]]
            detector, shares = Detector(mark.ratio, 4.0), {}
            for length in given.lengths:
                counts = [count_green(row[:length], mark, tokenizer.vocab_size) for row in ids if len(row) >= length]
                marked = [detector.verdict(count) == "watermarked" for count in counts]
                shares[f"{length} tokens"] = sum(marked) / max(1, len(marked))
            rows[way] = {"tokens/s": statistics.median(speeds[way]), **shares}
            rows[way]["perplexity"] = perplexity(given.model, answers[way], Path(scratch))
    print(f"{'':<20}" + "".join(f"{name:>12}" for name in rows["no mark"]))
    for way, values in rows.items():
        print(f"{way:<20}" + "".join(f"{value:12.2f}" for value in values.values()))
    print(f"written to {save('watermark', rows)}", file=sys.stderr)


if __name__ == "__main__":
    main()
