"""Cross entropy over a vocabulary that is cut over ranks (Shoeybi et al. 2019, section 3, last paragraph).

Only three numbers a token cross the group, never logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlm_cli import ops
from mlm_cli.parallel.context import Group


def valid_columns(v_local: int, group: Group, vocab_size: int) -> tuple[int, int]:
    """(first token of this rank's slice, columns of it that are tokens and not padding)."""
    start = group.rank * v_local
    return start, min(max(vocab_size - start, 0), v_local)


def combine_stats(stats: tuple[Tensor, Tensor, Tensor], group: Group) -> tuple[Tensor, Tensor]:
    """(log-sum-exp ``[t]``, logit of the label ``[t]``) over the whole vocabulary, from the local maxima and sums."""
    highest, total, target = stats
    if group.size == 1:
        return highest + total.log(), target
    parts = torch.stack(group.all_gather(torch.stack([highest, total, target])))  # [ranks, 3, t]
    top = parts[:, 0].amax(0)
    total = (parts[:, 1] * torch.exp(parts[:, 0] - top)).sum(0)
    return top + total.log(), parts[:, 2].sum(0)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: Group, vocab_size: int) -> Tensor:
        start, num_valid = valid_columns(logits.shape[1], group, vocab_size)
        lse, target = combine_stats(ops.cross_entropy_stats(logits, labels, start, num_valid), group)
        ctx.save_for_backward(logits, labels, lse)
        ctx.place = (start, num_valid)
        return lse - target

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, labels, lse = ctx.saved_tensors
        return ops.cross_entropy_grad_(logits.clone(), labels, lse, grad, *ctx.place), None, None, None


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, group: Group, vocab_size: int) -> Tensor:
    """Loss of each token, float32 ``[t]``, from the local slice of the logits.

    Args:
        logits: ``[t, v_local]``, padding included.
        labels: ``[t]``, in ``[0, vocab_size)``.
        vocab_size: without padding; columns beyond it never count.
    """
    return _VocabParallelCrossEntropy.apply(logits, labels, group, vocab_size)
