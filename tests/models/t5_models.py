"""T5 of several shapes, and batches of their kind, for tests."""

from __future__ import annotations

from typing import Any

import torch

from mlm_cli.config.schema import ModelSection

SIZES: dict[str, Any] = {
    "family": "t5",
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "head_dim": 6,  # heads together are wider than the states
    "ffn_hidden_size": 56,
    "seq_length": 24,
    "decoder_seq_length": 12,
    "vocab_size": 130,  # at 4 ranks the last slice holds padding alone
    "position": "relative",
    "relative_buckets": 8,
    "relative_max_distance": 16,
    "norm": "rmsnorm",
    "norm_eps": 1e-6,
    "bias": False,
}
SECTIONS = {
    "v1.0": ModelSection(**SIZES, activation="relu"),
    "v1.1": ModelSection(**SIZES, activation="geglu", tie_embeddings=False, num_decoder_layers=3),
}


def make_batch(model: ModelSection, seed: int, *, full: bool = False) -> dict[str, torch.Tensor]:
    """Three rows; texts and targets of two are padded, unless ``full``."""
    generator = torch.Generator().manual_seed(seed)
    vocab, targets = model.vocab_size or 0, torch.tensor([12, 12, 12] if full else [12, 9, 5])
    mask = torch.arange(12) < targets[:, None]
    labels = torch.randint(1, vocab, (3, 12), generator=generator).masked_fill(~mask, 0)
    batch = {
        "tokens": torch.randint(1, vocab, (3, 24), generator=generator),
        "decoder_tokens": torch.cat([torch.zeros(3, 1, dtype=torch.long), labels[:, :-1]], 1),
        "labels": labels,
        "loss_mask": mask.float(),
    }
    if not full:
        batch["lengths"] = torch.tensor([24, 17, 9])
        batch["tokens"].masked_fill_(torch.arange(24) >= batch["lengths"][:, None], 0)
    return batch


def shake(model: torch.nn.Module) -> None:
    """Make every weight matter, norms and tables too."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.empty_like(param).normal_(0, 0.15, generator=generator))
