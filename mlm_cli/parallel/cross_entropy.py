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


def combine_stats(parts: list[tuple[Tensor, Tensor, Tensor]], group: Group) -> tuple[Tensor, Tensor]:
    """(log-sum-exp ``[t]``, logit of the label ``[t]``) over the whole vocabulary.

    Args:
        parts: maxima, sums and label's logits (``ops.cross_entropy_stats``) of the columns this rank holds, in parts.
    """
    top, total, target = _merge(torch.stack([torch.stack(part) for part in parts])) if len(parts) > 1 else parts[0]
    if group.size > 1:
        top, total, target = _merge(torch.stack(group.all_gather(torch.stack([top, total, target]))))
    return top + total.log(), target


def _merge(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One maximum, sum and label's logit from those of several column ranges, ``[ranges, 3, t]``."""
    top = parts[:, 0].amax(0)
    # A range of padding alone has maximum -inf and sum 0; a rank of nothing else keeps them.
    shifted = torch.exp(parts[:, 0] - top.clamp(min=torch.finfo(top.dtype).min))
    return top, (parts[:, 1] * shifted).sum(0), parts[:, 2].sum(0)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: Group, vocab_size: int) -> Tensor:
        start, num_valid = valid_columns(logits.shape[1], group, vocab_size)
        lse, target = combine_stats([ops.cross_entropy_stats(logits, labels, start, num_valid)], group)
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


def vocab_parallel_argmax(logits: Tensor, group: Group, vocab_size: int) -> Tensor:
    """The likeliest token of each row of ``logits [t, v_local]``, int64 ``[t]``, equal on all ranks; no gradient."""
    start, num_valid = valid_columns(logits.shape[1], group, vocab_size)
    if num_valid:
        top, place = logits.detach()[:, :num_valid].float().max(1)
    else:  # a rank of padding alone
        top, place = logits.new_full((len(logits),), -torch.inf, dtype=torch.float32), logits.new_zeros(1, dtype=int)
    found = torch.stack([top.double(), (place + start).expand(len(logits)).double()])  # token numbers are exact in it
    parts = torch.stack(group.all_gather(found))  # [ranks, 2, t]
    return parts[:, 1].gather(0, parts[:, 0].argmax(0, keepdim=True))[0].long()
