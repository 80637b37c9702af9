"""The two passes of a cross entropy over a (possibly sliced) vocabulary, without a second copy of the logits."""

from __future__ import annotations

from torch import Tensor

from mlm_cli.ops import reference


def cross_entropy_stats(logits: Tensor, labels: Tensor, vocab_start: int, num_valid: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per row of ``logits [t, v]``: maximum, sum of exp(logit - maximum), the label's logit; float32 ``[t]`` each.

    Column ``j`` of this slice is token ``vocab_start + j``; columns from ``num_valid`` on are padding and ignored. A
    label outside the slice gives a target logit of 0, so that a sum over slices is right. No autograd.
    """
    return reference.cross_entropy_stats(logits, labels, vocab_start, num_valid)


def cross_entropy_grad_(
    logits: Tensor, labels: Tensor, lse: Tensor, scale: Tensor, vocab_start: int, num_valid: int
) -> Tensor:
    """In place: ``logits <- (exp(logits - lse) - onehot(labels)) * scale``; padding columns become 0. No autograd."""
    return reference.cross_entropy_grad_(logits, labels, lse, scale, vocab_start, num_valid)
