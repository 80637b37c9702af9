"""Samples a second that one core makes: reading, masking and stacking, for BERT and T5.

    python benchmarks/samples.py PREFIX --tokenizer TOK [--family bert|t5] [--seq-length 128 512]

A number to compare with what the model takes, not with a rival; medians of five rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time

from mlm_cli.config.schema import DataSection, ModelSection
from mlm_cli.data.samples import open_training_data
from mlm_cli.data.tokenizer import load_tokenizer

HEADS = {"bert": ("none", "sentence_order", "next_sentence"), "t5": ("none",)}


def samples_per_second(source, num: int, batch: int, first: int) -> float:  # type: ignore[no-untyped-def]
    begin = time.perf_counter()
    for start in range(first, first + num, batch):
        numbers = list(range(start, start + batch))
        source.collate([source.get(number) for number in numbers], numbers)
    return num / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--family", choices=list(HEADS), default="bert")
    parser.add_argument("--seq-length", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--samples", type=int, default=1024)
    given = parser.parse_args()
    tokenizer = load_tokenizer(given.tokenizer)
    for head in HEADS[given.family]:
        for seq_length in given.seq_length:
            model = ModelSection(family=given.family, seq_length=seq_length, binary_head=head)
            begin = time.perf_counter()
            source = open_training_data(DataSection(train=given.prefix), model, tokenizer, seed=1)["train"]
            opened = time.perf_counter() - begin
            samples_per_second(source, 256, 8, 0)
            speeds = [samples_per_second(source, given.samples, 8, round_ * given.samples) for round_ in range(5)]
            name = f"{given.family} {head}" if given.family == "bert" else given.family
            speed = statistics.median(speeds)
            print(f"{name:22} {seq_length:5} tokens: {speed:7,.0f} samples/s, opened in {opened * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
