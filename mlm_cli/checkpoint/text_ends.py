"""What a model in Hugging Face layout begins and ends its texts with, as transformers has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlm_cli.checkpoint.hub import read_model_config
from mlm_cli.checkpoint.weight_files import read_json
from mlm_cli.config.schema import ModelSection
from mlm_cli.data.tokenizer import Tokenizer
from mlm_cli.errors import CheckpointError


def end_ids(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end a text: the tokenizer's, and those that the model's own settings name."""
    found = set() if tokenizer.eod_id is None else {tokenizer.eod_id}
    named = _generation_settings(folder).get("eos_token_id")
    found.update(number for number in (named if isinstance(named, list) else [named]) if type(number) is int)
    return frozenset(found)


def start_id(folder: Path, section: ModelSection) -> int:
    """What a decoder begins with: as the model's settings say, and where they do not, T5's padding token.

    Raises:
        CheckpointError: an id that the model does not have.
    """
    _, config = read_model_config(folder)
    key = "decoder_start_token_id"
    said = _generation_settings(folder).get(key)
    start = said if type(said) is int else config.get(key, int, config.get("pad_token_id", int, 0))
    if not 0 <= start < (section.vocab_size or 0):
        raise CheckpointError(f"{config.where}: `{key}` is {start}, the model has {section.vocab_size} tokens")
    return int(start)


def _generation_settings(folder: Path) -> dict[str, Any]:
    """``generation_config.json``; of older models, which have none, ``config.json``, as transformers does."""
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else read_model_config(folder)[1].values
