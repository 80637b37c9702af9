"""Reading int8 weights on several ranks; no `transformers` here, so that ranks start quickly."""

from __future__ import annotations

from typing import Any

import torch

from mlm_cli.checkpoint.hub import load_model_folder
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.layers import ParallelLinear
from mlm_cli.parallel.shard import gather_full, shard_of


@torch.no_grad()
def read(rank: int, world_size: int, folders: list[str], ids: list[list[int]]) -> dict[str, Any]:
    """Of each folder, as floating point and as int8: the whole matrices, and for a GPT its logits."""
    parallel = ParallelContext.create(tensor=world_size)
    found: dict[str, Any] = {}
    for folder in folders:
        for keep in (False, True):
            model, _ = load_model_folder(folder, parallel, keep_int8=keep)
            model.eval()
            held = {
                name: gather_full(module.matrix(torch.float32), shard_of(module.weight), parallel.tensor).numpy()
                for name, module in model.named_modules()
                if isinstance(module, ParallelLinear)
            }
            logits = None
            if model.config.family == "gpt":
                logits = model.gather_logits(model(torch.tensor(ids))).numpy()
            found[f"{folder} {keep}"] = held, logits
    return found
