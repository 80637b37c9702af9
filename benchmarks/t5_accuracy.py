"""What a T5 run has learned of held-out text, against the frequencies of words.

    python benchmarks/t5_accuracy.py runs/t5-mini

Spans end after three tokens on average, so "the span ends here" is the likeliest single answer at most places, and
plain accuracy says little. Here the model is told that a word comes: the best of its words is taken, and its loss is
that of the words alone. The judge is transformers' T5 on the exported `model/`; frequencies are those of the training
targets.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import T5ForConditionalGeneration

from mlm_cli.checkpoint.folder import RunFolder
from mlm_cli.config.resolve import resolve_recipe
from mlm_cli.data.samples import open_training_data
from mlm_cli.data.span_corruption import with_targets
from mlm_cli.data.tokenizer import load_tokenizer


def batches(source: Any, samples: int, size: int = 40) -> Any:
    """The first ``samples`` samples, ``size`` at a time."""
    for start in range(0, samples, size):
        numbers = list(range(start, start + size))
        batch = source.collate([source.get(number) for number in numbers], numbers)
        yield {name: torch.as_tensor(values) for name, values in batch.items()}


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--step", type=int, help="of the checkpoint; unset: the newest")
    args = parser.parse_args()
    recipe = resolve_recipe(str(Path(args.run) / "recipe.yaml"))
    assert recipe.tokenizer is not None
    tokenizer = load_tokenizer(recipe.tokenizer)
    model_section = with_targets(recipe.model, recipe.data.span_corruption)
    data = open_training_data(recipe.data, model_section, tokenizer, seed=recipe.seed)
    step = args.step or RunFolder(Path(args.run)).steps()[-1]
    folder = Path(args.run) / f"step-{step:08d}" / "model"
    model = T5ForConditionalGeneration.from_pretrained(folder).eval()
    rows = model.config.vocab_size
    special = torch.zeros(rows, dtype=torch.bool)
    special[[*tokenizer.sentinel_ids, tokenizer.eod_id]] = True

    counts = torch.full((rows,), 0.5, dtype=torch.float64)
    for batch in batches(data["train"], 20 * args.samples):
        counts += torch.bincount(batch["labels"][batch["loss_mask"].bool()].long(), minlength=rows)
    counts[special] = 0
    frequency = counts / counts.sum()

    right, nats, words = 0, 0.0, []
    for batch in batches(data["valid"], args.samples):
        labels = batch["labels"].long()
        logits = model(batch["tokens"].long(), decoder_input_ids=batch["decoder_tokens"].long()).logits.float()
        word = batch["loss_mask"].bool() & ~special[labels]
        logits = logits[word].masked_fill(special, -torch.inf)
        right += int((logits.argmax(-1) == labels[word]).sum())
        nats -= float(logits.log_softmax(-1).gather(-1, labels[word][:, None]).sum())
        words.append(labels[word])
    targets = torch.cat(words)
    commonest = float((targets == frequency.argmax()).float().mean())
    print(f"step {step}, {len(targets):,} words: {right / len(targets):.1%} right, {nats / len(targets):.2f} nats")
    print(f"by frequency alone: {commonest:.1%} right, {-float(frequency[targets].log().mean()):.2f} nats")
    return 0


if __name__ == "__main__":
    sys.exit(main())
