"""How much models repeat themselves, by the way their answers are chosen: rep-n and diversity of Su et al. 2022.

    python benchmarks/repetition.py runs/plain runs/simctg --text novel.txt

Prompts are pieces of ``--text`` from all over it; what follows them there is the yardstick. rep-n is the share of
n-grams of words that have come before in an answer, over all answers; diversity the product of (1 - rep-n) for n from 2
to 4.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from interleave import save

WAYS = {
    "greedy": ["--temperature", "0"],
    "4 beams": ["generate.beams=4"],
    "contrastive, alpha 0.6, top-k 4": ["generate.contrastive_alpha=0.6", "--top-k", "4"],
    "top-p 0.95": ["--top-p", "0.95"],
}


def repetition(texts: list[str]) -> dict[str, float]:
    """rep-2, rep-3, rep-4 (per cent) and diversity."""
    found, diversity = {}, 1.0
    for n in (2, 3, 4):
        total = unique = 0
        for text in texts:
            words = text.split()
            grams = [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]
            total, unique = total + len(grams), unique + len(set(grams))
        found[f"rep-{n}"] = 100 * (1 - unique / max(1, total))
        diversity *= 1 - found[f"rep-{n}"] / 100
    return {**found, "diversity": diversity}


def pieces(text: str, count: int, prompt: int, answer: int) -> tuple[list[str], list[str]]:
    """Prompts of so many words, and the words that follow."""
    words = text.split()
    starts = [number * (len(words) - prompt - answer) // count for number in range(count)]
    prompts = [" ".join(words[start : start + prompt]) for start in starts]
    return prompts, [" ".join(words[start + prompt : start + prompt + answer]) for start in starts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--text", required=True)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--prompt-words", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    given = parser.parse_args()
    text = Path(given.text).read_text(encoding="utf-8")
    prompts, follows = pieces(text, given.prompts, given.prompt_words, given.tokens * 3 // 4)
    rows = {"text": {"as it goes on": repetition(follows)}}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "prompts.jsonl"
        file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
        for model in given.models:
            rows[model] = {}
            for way, words in WAYS.items():
                command = [sys.executable, "-m", "mlm_cli", "generate", model, "--prompts", str(file), "-q"]
                options = ["--max-new-tokens", str(given.tokens), "--format", "json", *words]
                out = subprocess.run([*command, *options], check=True, capture_output=True, text=True).stdout
                rows[model][way] = repetition([json.loads(line)["text"] for line in out.splitlines()])
    print(f"{'':<54}  rep-2  rep-3  rep-4  diversity")
    for model, ways in rows.items():
        for way, found in ways.items():
            print(f"{model:<20} {way:<33}" + "".join(f"{value:7.2f}" for value in found.values()))
    print(f"written to {save('repetition', rows)}", file=sys.stderr)


if __name__ == "__main__":
    main()
