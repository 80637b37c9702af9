"""A model of each kind that writes: as a folder, and in `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import transformers

from tests.generation.folders import save_folder, save_tokenizer
from tests.generation.test_encoder_decoder import make_t5
from tests.generation.test_generator import PROMPTS, TEXTS

KINDS = ("gpt2", "llama", "t5")
T5_PROMPTS = [[5, 9, 200, 31, 1], [17, 1], list(range(40, 140)), [300, 2, 2, 300, 2, 1], [399, 1], [8, 8, 8]]


class Pair(NamedTuple):
    """A model folder and the same model in `transformers`, with prompts, and what ends and begins its texts."""

    folder: Path
    theirs: transformers.PreTrainedModel
    prompts: list[list[int]]
    end: int
    start: int | None


def make_pair(kind: str, folder: Path) -> Pair:
    if kind == "t5":
        save_tokenizer(folder, TEXTS)
        return Pair(folder, make_t5(folder, "v1.0"), T5_PROMPTS, 1, 0)
    return Pair(folder, save_folder(folder, kind, TEXTS), PROMPTS, 0, None)
