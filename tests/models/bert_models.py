"""BERT of several shapes, and batches of their kind, for tests."""

from __future__ import annotations

from typing import Any

import torch

from mlm_cli.config.schema import ModelSection

SIZES: dict[str, Any] = {
    "family": "bert",
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "seq_length": 24,
    "vocab_size": 130,  # at 4 ranks the last slice holds padding alone
    "num_token_types": 2,
}
SECTIONS = {
    "original": ModelSection(
        **SIZES, norm_order="post", binary_head="next_sentence", norm_eps=1e-12, activation="gelu_erf"
    ),
    "megatron": ModelSection(**SIZES, binary_head="sentence_order"),
    "words only": ModelSection(**SIZES, norm_order="post", activation="gelu_erf", ffn_hidden_size=56),
    "megatron untied": ModelSection(**SIZES, tie_embeddings=False),
}


def make_batch(model: ModelSection, seed: int, *, full: bool = False) -> dict[str, torch.Tensor]:
    """Three rows, two of them padded (unless ``full``), at most four masked words each."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([24, 24, 24] if full else [24, 17, 9])
    tokens = torch.randint(1, model.vocab_size or 0, (3, 24), generator=generator)
    places = torch.stack([torch.randperm(int(length), generator=generator)[:4] for length in lengths])
    batch = {
        "tokens": tokens.masked_fill(torch.arange(24) >= lengths[:, None], 0),
        "lengths": lengths,
        "token_types": (torch.arange(24) >= 7).long().expand(3, 24),
        "masked_positions": places,
        "labels": torch.randint(0, model.vocab_size or 0, (3, 4), generator=generator),
        "loss_mask": torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]),
    }
    if model.binary_head != "none":
        batch["binary_labels"] = torch.randint(0, 2, (3,), generator=generator)
    return batch


def shake(model: torch.nn.Module) -> None:
    """Make every weight matter, biases and norms too."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.empty_like(param).normal_(0, 0.15, generator=generator))
