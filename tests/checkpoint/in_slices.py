"""Reading, writing and continuing text on several ranks; no `transformers` here, so that ranks start quickly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlm_cli.checkpoint.hub import load_model_folder, save_model_folder
from mlm_cli.parallel.context import ParallelContext


def read_write_and_continue(
    rank: int, world_size: int, folder: str, prompt: list[list[int]], ids: list[list[int]]
) -> dict[Any, Any]:
    """Every ``*.theirs`` in ``folder`` at each layout of two ranks: written again beside it, and continued greedily.

    Of every ``*.megatron`` the logits for ``ids``.
    """
    found = {}
    for layout in ("tensor 2", "pipeline 2"):
        parallel = ParallelContext.create(**{layout.split()[0]: world_size})
        for source in sorted(Path(folder).glob("*.theirs")):
            model, _ = load_model_folder(source, parallel)
            save_model_folder(model.eval(), source.with_suffix(f".{layout}"))
            seen = torch.tensor(prompt)
            for _ in range(8):
                logits = logits_everywhere(model, seen, parallel)
                seen = torch.cat([seen, logits[:, -1:].argmax(-1)], 1)
            found[source.stem, layout] = {"logits": logits.numpy(), "seen": seen.tolist()}
        for source in sorted(Path(folder).glob("*.megatron")):
            model, _ = load_model_folder(source, parallel)
            found[source.stem, layout] = logits_everywhere(model.eval(), torch.tensor(ids), parallel).numpy()
    return found


@torch.no_grad()
def logits_everywhere(model: Any, ids: Tensor, parallel: ParallelContext) -> Tensor:
    """Logits ``[b, s, v]`` on every rank; hidden states go from stage to stage."""
    pipeline = parallel.pipeline
    hidden = torch.zeros(*ids.shape, model.config.hidden_size)
    for stage in range(pipeline.size):
        if pipeline.rank == stage:
            hidden = model.run(ids if stage == 0 else hidden, model.info({"tokens": ids})).contiguous()
        if pipeline.size > 1:
            dist.broadcast(hidden, pipeline.ranks[stage], group=pipeline.handle)
    logits = torch.zeros(*ids.shape, model.vocab_size)
    if model.has_head:
        logits = model.gather_logits(model.logits(hidden)).contiguous()
    if pipeline.size > 1:
        dist.broadcast(logits, pipeline.ranks[-1], group=pipeline.handle)
    return logits
