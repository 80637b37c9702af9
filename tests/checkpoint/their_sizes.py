"""Sizes of small models, in the words that most configurations of transformers share."""

from __future__ import annotations

from typing import Any

THEIR_SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}
