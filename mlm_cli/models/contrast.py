"""Contrastive training against repetition (SimCTG: Su et al. 2022, A Contrastive Framework for Neural Text Generation).

In the last layer of a language model the tokens of a text lie close to each other, and a decoder that looks for the
likeliest text then goes round in circles. Here the cosine of two tokens of a text is pushed below ``1 - margin``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mlm_cli.models.extra_loss import ExtraLoss
from mlm_cli.parallel.context import ParallelContext

_BLOCK = 1 << 22  # cosines held at once


def contrastive_loss(
    hidden: Tensor, margin: float, *, real: Tensor | None = None, segments: Tensor | None = None
) -> Tensor:
    """The loss of equation 2, a float32 scalar: the mean over the texts; a text without pairs adds nothing.

    Of a text: the mean of ``max(0, margin - 1 + cos(h_i, h_j))`` over the pairs of different tokens.

    Args:
        hidden: ``[b, s, h]``, what the output layer is multiplied with.
        real: ``[b, s]`` bool, which tokens are no padding; unset: all.
        segments: ``[b, s]`` document numbers: only tokens of one document make a pair.
    """
    return _ContrastiveLoss.apply(hidden, margin, real, segments)


class _ContrastiveLoss(torch.autograd.Function):
    """Works its gradient out beside the loss, a block of rows at a time: the cosines are never held all at once."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, margin: float, real: Tensor | None, segments: Tensor | None) -> Tensor:
        b, s, _ = hidden.shape
        length = hidden.float().norm(dim=-1, keepdim=True).clamp_min(1e-12)
        unit = hidden.float() / length
        losses, pairs, pull = unit.new_zeros(b), unit.new_zeros(b), torch.empty_like(unit)
        rows, columns = max(1, _BLOCK // (b * s)), torch.arange(s, device=hidden.device)
        for first in range(0, s, rows):
            block = slice(first, first + rows)
            counted = (columns[block, None] != columns).expand(b, -1, -1)
            if real is not None:
                counted = counted & real[:, block, None] & real[:, None]
            if segments is not None:
                counted = counted & (segments[:, block, None] == segments[:, None])
            excess = torch.baddbmm(unit.new_tensor(margin - 1.0), unit[:, block], unit.transpose(1, 2))
            close = counted & (excess > 0)
            losses += (excess * close).sum((1, 2))
            pairs += counted.sum((1, 2))
            pull[:, block] = close.to(unit.dtype) @ unit
        share = 1.0 / (pairs.clamp_min(1.0) * b)
        pull -= (pull * unit).sum(-1, keepdim=True) * unit  # a longer state is no farther away
        own = pull / length * (2.0 * share)[:, None, None]  # a pair counts at both of its tokens
        # Not yet scaled, it would be lost in float16.
        ctx.dtype = hidden.dtype
        ctx.save_for_backward(own if hidden.dtype == torch.float16 else own.to(hidden.dtype))
        return (losses * share).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (own,) = ctx.saved_tensors
        return (own * grad).to(ctx.dtype), None, None, None


class Contrast(ExtraLoss):
    """Adds the contrastive loss to that of the model whose last states go through here. It has no parameters.

    The loss that training reports stays that of the words; this one is in ``contrast_statistics``.

    Args:
        margin: cosines of a text's tokens are pushed below ``1 - margin`` (rho of the paper, which takes 0.5).
    """

    def __init__(self, margin: float) -> None:
        super().__init__()
        self.margin = margin
        self._seen: Tensor | None = None  # sum of the losses since the last look, and how many they are

    def forward(self, hidden: Tensor, real: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """``hidden [b, s, h]``, unchanged; arguments as in ``contrastive_loss``. Nothing is done outside training."""
        if not (self.training and torch.is_grad_enabled()):
            return hidden
        loss = contrastive_loss(hidden, self.margin, real=real, segments=segments)
        seen = torch.stack([loss.detach().double(), torch.ones_like(loss, dtype=torch.float64)])
        self._seen = seen if self._seen is None else self._seen + seen
        return self.minimise(loss, hidden)

    def take_statistics(self) -> Tensor | None:
        """Sum of the losses since the last call, and their number, ``[2]``."""
        seen, self._seen = self._seen, None
        return seen

    def extra_repr(self) -> str:
        return f"margin {self.margin}"


def contrast_statistics(model: nn.Module, parallel: ParallelContext) -> dict[str, float]:
    """The mean contrastive loss of all ranks' micro-batches since the last call; empty where there were none.

    All ranks call; waits for the device.
    """
    found = [module.take_statistics() for module in model.modules() if isinstance(module, Contrast)]
    both = sum((row for row in found if row is not None), torch.zeros(2, dtype=torch.float64, device=parallel.device))
    loss, count = parallel.pipeline.all_reduce_(parallel.data.all_reduce_(both)).tolist()
    return {"contrastive_loss": loss / count} if count else {}
