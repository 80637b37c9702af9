"""Softmax of attention scores with scale, mask and dropout in one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from mlm_cli.ops import reference, registry
from mlm_cli.ops.autograd import dropout_seed

if registry.cpu_loaded:
    from mlm_cli.ops import kernels


def scaled_masked_softmax(
    scores: Tensor, mask: Tensor | None = None, scale: float = 1.0, dropout: float = 0.0
) -> Tensor:
    """``dropout(softmax(scores * scale + mask))`` over the last dimension.

    Args:
        scores: ``[..., keys]``.
        mask: broadcasts to ``scores``; bool (True = hidden) or floating (added after the scaling). A floating mask may
            need a gradient.
        scale: factor on the scores.
        dropout: probability.

    Returns:
        Probabilities in the dtype of ``scores``; a row with every key hidden is zero, and so is its gradient.
    """
    if not registry.serves(scores):
        return reference.scaled_masked_softmax(scores, mask, scale, dropout)
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        scores = (scores if scale == 1.0 else scores * scale) + mask.to(scores.dtype)
        mask, scale = None, 1.0
    return kernels.masked_softmax(scores, mask, dropout_seed(scores, dropout), scale, dropout)


def scaled_causal_softmax(
    scores: Tensor, scale: float = 1.0, *, offset: int = 0, window: int | None = None, dropout: float = 0.0
) -> Tensor:
    """``dropout(softmax(scores * scale))`` where a query sees no later key; hidden scores are not even read.

    Args:
        scores: ``[..., queries, keys]``.
        offset: position of the first query among the keys (cached decoding: ``keys - queries``).
        window: keys a query sees at most, itself counted; None = all before it.

    Returns:
        Probabilities; query ``i`` has zeros outside ``i + offset - window < j <= i + offset``.

    Raises:
        ValueError: a window below 1.
    """
    if window is not None and window < 1:
        raise ValueError(f"scaled_causal_softmax: `window` must be at least 1 or None, got {window}")
    if not registry.serves(scores):
        return reference.scaled_causal_softmax(scores, scale, offset, window, dropout)
    return kernels.causal_softmax(scores, dropout_seed(scores, dropout), scale, offset, window or 0, dropout)


def softmax_gradient(
    grad: Tensor, probs: Tensor, scale: float = 1.0, *, offset: int | None = None, window: int | None = None
) -> Tensor:
    """The gradient of the scores, for passes that make the probabilities again instead of having autograd keep them.

    Args:
        grad: of ``probs``, which are ``[..., queries, keys]`` and had no dropout.
        offset, window: as ``scaled_causal_softmax`` was given them; ``offset`` None: from ``scaled_masked_softmax``.
    """
    if not registry.serves(probs):
        return reference.softmax_gradient(grad, probs, scale)
    return kernels.softmax_backward(grad, probs, None, scale, 0.0, offset is not None, offset or 0, window or 0)
