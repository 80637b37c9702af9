"""Softmax of attention scores with scale and mask fused."""

from __future__ import annotations

from torch import Tensor

from mlm_cli.ops import reference


def scaled_masked_softmax(scores: Tensor, mask: Tensor | None = None, scale: float = 1.0, dropout: float = 0.0) -> Tensor:
    """``softmax(scores * scale)`` over the last dimension; ``mask`` broadcasts, True = hidden, a float mask is added."""
    return reference.scaled_masked_softmax(scores, mask, scale, dropout)


def scaled_causal_softmax(
    scores: Tensor, scale: float = 1.0, *, offset: int = 0, window: int | None = None, dropout: float = 0.0
) -> Tensor:
    """Softmax of ``scores [..., queries, keys]`` where query ``i`` sees keys ``i + offset - window < j <= i + offset``."""
    return reference.scaled_causal_softmax(scores, scale, offset, window, dropout)
