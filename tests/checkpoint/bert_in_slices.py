"""Reading and writing BERT on several ranks; no `transformers` here, so that ranks start quickly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mlm_cli.checkpoint.hub import load_model_folder, save_model_folder
from mlm_cli.models.bert import Bert
from mlm_cli.parallel.context import ParallelContext


@torch.no_grad()
def read_and_write(rank: int, world_size: int, folders: list[str], batch: dict[str, Any]) -> dict[str, Any]:
    """Each folder in tensor slices: logits of the words (and of the binary head); ``hf`` ones written again beside."""
    parallel = ParallelContext.create(tensor=world_size)
    inputs = {name: torch.tensor(values) for name, values in batch.items()}
    found = {}
    for folder in folders:
        model, _ = load_model_folder(folder, parallel)
        assert isinstance(model, Bert)
        hidden = model.eval().hidden(inputs["tokens"], lengths=inputs["lengths"], token_types=inputs["token_types"])
        binary = None if model.head.binary is None else model.head.binary_logits(hidden).numpy()
        found[folder] = model.gather_logits(model.logits(hidden)).numpy(), binary
        if (Path(folder) / "config.json").is_file():
            save_model_folder(model, f"{folder}.again")
    return found
