"""Output layer and cross entropy in one: logits exist for a block of tokens only, and become gradients in place.

The gradients are made in the forward pass, as in Liger-Kernel's ``fused_linear_cross_entropy`` (Hsu et al. 2024); the
vocabulary is cut over ranks as in ``cross_entropy``. Inside a block the work goes by columns: a product of some columns
is still in cache when its maxima and sums are taken, and again when it becomes a gradient and is multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mlm_cli import ops
from mlm_cli.ops import products
from mlm_cli.parallel.context import Group
from mlm_cli.parallel.cross_entropy import combine_stats, valid_columns
from mlm_cli.parallel.linear import weight_gradient
from mlm_cli.parallel.logits import LOGITS_BYTES

# Columns worked on at a time on the CPU. On a GPU one large product is better than many.
_COLUMNS = 2048


def block_tokens(num_tokens: int, weight: Tensor) -> int:
    """Tokens a block: as many as keep the logits within the budget, a multiple of 32, evenly spread."""
    budget = LOGITS_BYTES["cpu" if weight.is_cpu else "cuda"]
    most = max(budget // (weight.shape[0] * weight.element_size()), 32)
    blocks = max(-(-num_tokens // most), 1)
    return min(num_tokens, -(-num_tokens // (blocks * 32)) * 32) or 1


class _Block:
    """The logits ``[t, v_local]`` of a block of tokens, by columns."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, group: Group, vocab_size: int
    ) -> None:
        self.hidden, self.weight, self.bias, self.labels, self.group = hidden, weight, bias, labels, group
        self.start, self.num_valid = valid_columns(weight.shape[0], group, vocab_size)

    def columns(self) -> Iterator[tuple[slice, int, int]]:
        """Slices of the columns, with the token number of their first and how many of them are no padding."""
        v_local = self.weight.shape[0]
        step = _COLUMNS if self.weight.is_cpu else v_local
        for first in range(0, v_local, step):
            last = min(first + step, v_local)
            yield slice(first, last), self.start + first, min(max(self.num_valid - first, 0), last - first)

    def fill(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits; returns log-sum-exp and label's logit of each token over the whole vocabulary."""
        found = []
        for cut, first, valid in self.columns():
            if self.bias is None:
                products.mm(self.hidden, self.weight[cut].t(), out=logits[:, cut])
            else:
                products.addmm(self.bias[cut], self.hidden, self.weight[cut].t(), out=logits[:, cut])
            found.append(ops.cross_entropy_stats(logits[:, cut], self.labels, first, valid))
        return combine_stats(found, self.group)

    def gradients(
        self, logits: Tensor, lse: Tensor, scale: Tensor, grad_hidden: Tensor, grad_weight: Tensor,
        grad_bias: Tensor | None, add: bool,
    ) -> None:  # fmt: skip
        """Turn logits into their gradients; write that of the hidden states, write or add to that of the weight, add to
        that of the bias."""
        for cut, first, valid in self.columns():
            ops.cross_entropy_grad_(logits[:, cut], self.labels, lse, scale, first, valid)
            if add:
                grad_weight[cut] += weight_gradient(logits[:, cut], self.hidden)
            else:
                weight_gradient(logits[:, cut], self.hidden, out=grad_weight[cut])
            if grad_bias is not None:
                grad_bias[cut] += logits[:, cut].sum(0, dtype=torch.float32)
        products.mm(logits, self.weight, out=grad_hidden)


def token_losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, group: Group, vocab_size: int, bias: Tensor | None = None
) -> Tensor:
    """Loss of each token, float32 ``[t]``; no gradient. Arguments as ``vocab_parallel_linear_cross_entropy``."""
    losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
    step = block_tokens(hidden.shape[0], weight)
    with torch.no_grad():
        buffer = weight.new_empty(step, weight.shape[0])
        for rows in _rows(hidden.shape[0], step):
            block = _Block(hidden[rows], weight, bias, labels[rows], group, vocab_size)
            lse, target = block.fill(buffer[: block.hidden.shape[0]])
            torch.sub(lse, target, out=losses[rows])
    return losses


def _rows(num_tokens: int, step: int) -> Iterator[slice]:
    for first in range(0, num_tokens, step):
        yield slice(first, min(first + step, num_tokens))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: Tensor, group: Group,
        vocab_size: int,
    ) -> Tensor:  # fmt: skip
        step = block_tokens(hidden.shape[0], weight)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        # Sums over several blocks are kept in float32: bfloat16 would lose the small ones.
        several = step < hidden.shape[0]
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if several else torch.empty_like(weight)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        buffer = weight.new_empty(step, weight.shape[0])
        for rows in _rows(hidden.shape[0], step):
            block = _Block(hidden[rows], weight, bias, labels[rows], group, vocab_size)
            logits = buffer[: rows.stop - rows.start]
            lse, target = block.fill(logits)
            loss += torch.dot(lse - target, scale[rows])
            block.gradients(logits, lse, scale[rows], grad_hidden[rows], grad_weight, grad_bias, several)
        group.all_reduce_(grad_hidden)
        grad_bias = None if grad_bias is None or bias is None else grad_bias.to(bias.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype), grad_bias)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        # A gradient of exactly 1 (usual: the mean is in `scale`) leaves nothing to do; on a GPU asking costs more.
        if grad.device.type != "cpu" or grad.item() != 1.0:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
            grad_weight = grad_weight * grad.to(grad_weight.dtype)
            grad_bias = None if grad_bias is None else grad_bias * grad.to(grad_bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def vocab_parallel_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor | None,
    group: Group,
    vocab_size: int,
    *,
    bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """``scale * sum over tokens of loss_mask * cross entropy``, a float32 scalar.

    Args:
        hidden: ``[t, h]``, equal on all ranks of ``group``; its gradient comes back summed over the group.
        weight: ``[v_local, h]``, this rank's rows of the output layer, padding included.
        labels: ``[t]``, in ``[0, vocab_size)``.
        loss_mask: ``[t]`` weights of the tokens; None counts all.
        vocab_size: without padding; padded rows get no probability and a zero gradient.
        bias: ``[v_local]``, added to the logits.
        scale: 1 / number of tokens makes it a mean.
    """
    num_tokens = hidden.shape[0]
    scales = torch.ones(num_tokens, device=hidden.device) if loss_mask is None else loss_mask.float()
    scales = scales * scale
    if not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
        return torch.dot(token_losses(hidden, weight, labels, group, vocab_size, bias), scales)
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels, scales, group, vocab_size)
