"""Output layer and cross entropy in one, a chunk of tokens at a time: the logits of a batch never exist together.

The gradients are made in the forward pass while a chunk's logits are in cache, as in Liger-Kernel's
``fused_linear_cross_entropy`` (Hsu et al. 2024); the vocabulary is cut over ranks as in ``cross_entropy``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlm_cli import ops
from mlm_cli.parallel.context import Group
from mlm_cli.parallel.cross_entropy import combine_stats, valid_columns

# Bytes of logits worked on at a time.
_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}


def chunk_tokens(num_tokens: int, v_local: int, element_size: int, device_type: str) -> int:
    """Tokens a chunk: as many as keep their logits within the budget, a multiple of 32, evenly spread."""
    most = max(_CHUNK_BYTES.get(device_type, 256 << 20) // (v_local * element_size), 32)
    chunks = -(-num_tokens // most)
    return min(num_tokens, -(-num_tokens // (chunks * 32)) * 32)


def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, group: Group, vocab_size: int) -> Tensor:
    """Loss of each token, float32 ``[t]``; no gradient. Arguments as ``vocab_parallel_linear_cross_entropy``."""
    losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
    start, num_valid = valid_columns(weight.shape[0], group, vocab_size)
    step = chunk_tokens(hidden.shape[0], weight.shape[0], weight.element_size(), hidden.device.type)
    with torch.no_grad():
        for first in range(0, hidden.shape[0], max(step, 1)):
            rows = slice(first, first + step)
            logits = hidden[rows] @ weight.t()
            lse, target = combine_stats(ops.cross_entropy_stats(logits, labels[rows], start, num_valid), group)
            torch.sub(lse, target, out=losses[rows])
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, group: Group, vocab_size: int
    ) -> Tensor:
        start, num_valid = valid_columns(weight.shape[0], group, vocab_size)
        step = chunk_tokens(hidden.shape[0], weight.shape[0], weight.element_size(), hidden.device.type)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        several = step < hidden.shape[0]
        # Sums of chunks are kept in float32: bfloat16 would lose the small ones.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if several else torch.empty_like(weight)
        for first in range(0, hidden.shape[0], step):
            rows = slice(first, first + step)
            logits = hidden[rows] @ weight.t()
            lse, target = combine_stats(ops.cross_entropy_stats(logits, labels[rows], start, num_valid), group)
            loss += torch.dot(lse - target, scale[rows])
            ops.cross_entropy_grad_(logits, labels[rows], lse, scale[rows], start, num_valid)
            torch.mm(logits, weight, out=grad_hidden[rows])
            if several:
                grad_weight += logits.t() @ hidden[rows]
            else:
                torch.mm(logits.t(), hidden, out=grad_weight)
        group.all_reduce_(grad_hidden)
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # A gradient of exactly 1 (usual: the mean is in `scale`) leaves nothing to do; on a GPU asking costs more.
        if grad.device.type != "cpu" or grad.item() != 1.0:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
            grad_weight = grad_weight * grad.to(grad_weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def vocab_parallel_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor | None,
    group: Group,
    vocab_size: int,
    *,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """``scale * sum over tokens of loss_mask * cross entropy``, a float32 scalar.

    Args:
        hidden: ``[t, h]``, equal on all ranks of ``group``; its gradient comes back summed over the group.
        weight: ``[v_local, h]``, this rank's rows of the output layer, padding included.
        labels: ``[t]``, in ``[0, vocab_size)``.
        loss_mask: ``[t]`` weights of the tokens; None counts all.
        vocab_size: without padding; padded rows get no probability and a zero gradient.
        scale: 1 / number of tokens makes it a mean.
    """
    num_tokens = hidden.shape[0]
    scales = torch.ones(num_tokens, device=hidden.device) if loss_mask is None else loss_mask.float()
    scales = scales * scale
    if not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
        return torch.dot(token_losses(hidden, weight, labels, group, vocab_size), scales)
    return _LinearCrossEntropy.apply(hidden, weight, labels, scales, group, vocab_size)
