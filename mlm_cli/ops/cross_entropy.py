"""The two passes of a cross entropy over a (possibly sliced) vocabulary, without a second copy of the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from mlm_cli.ops import reference, registry

if registry.cpu_loaded:
    from mlm_cli.ops import kernels


@torch.no_grad()
def cross_entropy_stats(
    logits: Tensor, labels: Tensor, vocab_start: int, num_valid: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Per row of ``logits [t, v]``: maximum, sum of exp(logit - maximum), the label's logit; float32 ``[t]`` each.

    Column ``j`` of this slice is token ``vocab_start + j``; columns from ``num_valid`` on are padding and ignored. A
    label outside the slice gives a target logit of 0, so that a sum over slices is right. No autograd.
    """
    if registry.serves(logits):
        return kernels.cross_entropy_stats(logits, labels, vocab_start, num_valid)
    return reference.cross_entropy_stats(logits, labels, vocab_start, num_valid)


@torch.no_grad()
def cross_entropy_grad_(
    logits: Tensor, labels: Tensor, lse: Tensor, scale: Tensor, vocab_start: int, num_valid: int
) -> Tensor:
    """In place: ``logits <- (exp(logits - lse) - onehot(labels)) * scale``; padding columns become 0. No autograd.

    ``lse [t]`` (log of the sum over the whole vocabulary) and ``scale [t]`` are float32. Returns ``logits``.
    """
    if registry.serves(logits):
        kernels.cross_entropy_grad_(logits, labels, lse, scale, vocab_start, num_valid)
        return logits
    return reference.cross_entropy_grad_(logits, labels, lse, scale, vocab_start, num_valid)
