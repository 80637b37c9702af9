"""What a watermark costs and what it is worth: tokens a second, share of answers found by length, perplexity.

    python benchmarks/watermark.py runs/gpt --text novel.txt

Prompts are pieces of ``--text``, answers are sampled. The ways take turns; speeds are medians, in
seconds of the processor, which other programs do not eat into. Perplexity is that of the same model for the answers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from interleave import save
from repetition import pieces

from mlm_cli.checkpoint.hub import load_model_folder, resolve_model
from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.evaluation.watermark import Detector, count_green
from mlm_cli.generation.answer import Settings
from mlm_cli.generation.answerer import decoder_of, make_answerer
from mlm_cli.generation.encoding import PromptEncoder
from mlm_cli.generation.prompts import from_texts
from mlm_cli.generation.sampling import Sampling
from mlm_cli.generation.text_stream import text_stream
from mlm_cli.generation.watermark import Watermark
from mlm_cli.parallel.context import ParallelContext

KEY = 1234577291
WAYS = {
    "no mark": None,
    "no mark again": None,
    "bias 1": Watermark(KEY, 1.0),
    "bias 2": Watermark(KEY, 2.0),
    "bias 4": Watermark(KEY, 4.0),
    "selfhash, bias 2": Watermark(KEY, 2.0, scheme="selfhash", context=4),
}


def perplexity(model: str, texts: list[str]) -> float:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "answers.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        command = [sys.executable, "-m", "mlm_cli", "evaluate", model, "--task", "perplexity", "--data", str(file)]
        done = subprocess.run([*command, "--format", "json", "-q"], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)["results"]["perplexity"]["token_perplexity,none"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[25, 50, 100, 200])
    given = parser.parse_args()
    folder = resolve_model(given.model)
    tokenizer = load_tokenizer(str(folder))
    model, section = load_model_folder(folder, ParallelContext.single())
    model.eval().requires_grad_(False)
    texts, _ = pieces(Path(given.text).read_text(encoding="utf-8"), given.prompts, 24, 0)
    prompts = list(PromptEncoder(tokenizer, section.seq_length).encode_all(from_texts(texts)))
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    answers: dict[str, list[str]] = {}
    for _ in range(given.rounds):
        for way, mark in WAYS.items():
            settings = Settings(Sampling(given.temperature, watermark=mark), max(given.lengths))
            decoder = decoder_of(model, given.batch_size, settings, start_id=None)
            begin = time.process_time()
            found = list(make_answerer(decoder, settings, lambda: text_stream(tokenizer)).answers(prompts))
            speeds[way].append(sum(len(answer.tokens) for answer in found) / (time.process_time() - begin))
            answers[way] = [answer.text for answer in found]
    rows = {}
    for way, mark in WAYS.items():
        looked, detector = mark or WAYS["bias 2"], Detector(0.25, 4.0)
        ids, shares = [tokenizer.encode(text) for text in answers[way]], {}
        for length in given.lengths:
            counts = [count_green(row[:length], looked, section.vocab_size) for row in ids]
            marked = [detector.verdict(count) == "watermarked" for count in counts]
            shares[f"{length} tokens"] = sum(marked) / len(marked)
        rows[way] = {"tokens/s": statistics.median(speeds[way]), **shares}
        rows[way]["perplexity"] = perplexity(given.model, answers[way])
    print(f"{'':<20}" + "".join(f"{name:>12}" for name in rows["no mark"]))
    for way, values in rows.items():
        print(f"{way:<20}" + "".join(f"{value:12.2f}" for value in values.values()))
    print(f"written to {save('watermark', rows)}", file=sys.stderr)


if __name__ == "__main__":
    main()
