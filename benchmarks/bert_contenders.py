"""One contender of ``benchmarks/bert.py``: trains a BERT on masked words, so many steps each time it is asked.

All see the same random tokens with the same places masked, the same shapes, AdamW and a gradient norm clipped at 1.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from interleave import serve
from torch import Tensor

LAYERS, HIDDEN, HEADS, LENGTH, VOCAB = 6, 384, 6, 128, 30522
MASKED = 19  # 15 of 100
LR, BETAS, DECAY, CLIP = 1e-3, (0.9, 0.98), 0.01, 1.0
Work = Callable[[int], dict[str, Any]]


def rows(batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids ``[b, s]`` and masked places ``[b, m]``, in order, the same for every contender."""
    generator = torch.Generator().manual_seed(0)
    while True:
        ids = torch.randint(0, VOCAB, (batch, LENGTH), generator=generator)
        yield ids, torch.rand(batch, LENGTH, generator=generator).topk(MASKED).indices.sort().values


def transformers_loop(args: argparse.Namespace, *, compiled: bool) -> Work:
    """BertForMaskedLM in a plain loop: autocast for bf16, torch's fused AdamW, its own loss over all places."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=4 * HIDDEN, max_position_embeddings=LENGTH, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model: Any = BertForMaskedLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, fused=True)
    parameters = list(model.parameters())
    model = torch.compile(model) if compiled else model
    data, bf16 = rows(args.batch), args.precision == "bf16"

    def work(steps: int) -> dict[str, Any]:
        for _ in range(steps):
            ids, places = next(data)
            labels = torch.full_like(ids, -100).scatter_(1, places, ids.gather(1, places))
            with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
                loss = model(ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {"loss": float(loss)}

    return work


def mlm(args: argparse.Namespace) -> Work:
    """Ours: model, engine and objective as `mlm pretrain` builds them."""
    from mlm_cli import distributed
    from mlm_cli.config.schema import ModelSection
    from mlm_cli.jobs.pretrain import objective
    from mlm_cli.models.registry import build_model
    from mlm_cli.parallel.context import ParallelContext
    from mlm_cli.training.allocator import keep_freed_memory
    from mlm_cli.training.engine import OptimizerSettings
    from mlm_cli.training.engine_choice import build_engine

    env = distributed.init()
    keep_freed_memory()
    parallel = ParallelContext.create(device=env.device)
    section = ModelSection(
        family="bert", num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, seq_length=LENGTH,
        vocab_size=VOCAB, num_token_types=2, norm_order="post", activation="gelu_erf", norm_eps=1e-12,
    )  # fmt: skip
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    model = build_model(section, parallel, seed=1).train()
    model.dtype = dtype
    settings = OptimizerSettings(betas=BETAS, weight_decay=DECAY, clip_grad=CLIP)
    engine = build_engine("plain", model, parallel, settings, dtype=dtype, accumulation=1, micro_batch_size=args.batch)
    data = rows(args.batch)

    def work(steps: int) -> dict[str, Any]:
        for _ in range(steps):
            ids, places = next(data)
            batch = {
                "tokens": ids,
                "lengths": torch.full((args.batch,), LENGTH),
                "token_types": torch.zeros_like(ids),
                "masked_positions": places,
                "labels": ids.gather(1, places),
                "loss_mask": torch.ones(places.shape),
            }
            (outcome,) = engine.accumulate(objective, [batch])
            engine.step(LR)
        return {"loss": float(outcome.loss)}

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    args = parser.parse_args()
    torch.manual_seed(1)
    makers: dict[str, Callable[[], Work]] = {
        "mlm": lambda: mlm(args),
        "mlm-again": lambda: mlm(args),
        "transformers": lambda: transformers_loop(args, compiled=False),
        "transformers-compile": lambda: transformers_loop(args, compiled=True),
    }
    if args.contender not in makers:
        sys.exit(f"error: no contender `{args.contender}`; there are {', '.join(makers)}")
    work = makers[args.contender]()
    work(3)
    serve(work)


if __name__ == "__main__":
    main()
