"""Training attention for processors whose matrix units are fast in bfloat16 and whose fused attention is not.

Forward is torch's fused attention. Its backward for the CPU runs at a small share of the bfloat16 matrix rate, and it
has none for a bias that learns: it would fall back to plain code with all scores in memory. Here the probabilities are
recomputed a block of queries at a time (as Dao et al. 2022, section 3.1, do on GPUs) with plain batched products around
our softmax kernel. Memory grows with the block, not with the square of the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlm_cli import ops
from mlm_cli.models.rotary import rotate_

# Bytes of scores at a time: they, the probabilities and two gradients of the same size pass through the cache.
_BLOCK_BYTES = 4 << 20
_QUERIES = 256


def suits(x: Tensor, bias: Tensor | None = None) -> bool:
    """True where this beats torch's own backward (measured; float32 gains with a bias alone)."""
    return x.is_cpu and (x.dtype == torch.bfloat16 or bias is not None) and torch.is_grad_enabled()


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, visible: Tensor | None, bias: Tensor | None,
        num_heads: int, causal: bool, scale: float,
    ) -> Tensor:  # fmt: skip
        num_groups = (qkv.shape[2] - num_heads) // 2
        if cos is not None and sin is not None:
            qkv = qkv.clone()
            rotate_(qkv[:, :, : num_heads + num_groups], cos, sin)
        query, key, value = (x.transpose(1, 2) for x in qkv.split([num_heads, num_groups, num_groups], 2))
        mask = visible if bias is None else bias.to(qkv.dtype)
        out = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=causal and mask is None, scale=scale, enable_gqa=num_groups != num_heads
        )
        ctx.save_for_backward(qkv, cos, sin, visible if bias is None else None, bias)
        ctx.num_heads, ctx.num_groups, ctx.causal, ctx.scale = num_heads, num_groups, causal, scale
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cos, sin, visible, bias = ctx.saved_tensors
        bias = None if bias is None else bias.detach()
        grad_qkv = torch.empty_like(qkv)
        grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[4] else None
        rows = max(1, _BLOCK_BYTES // (ctx.num_heads * min(_QUERIES, qkv.shape[1]) * qkv.shape[1] * qkv.element_size()))
        for first in range(0, qkv.shape[0], rows):
            part = slice(first, first + rows)
            visible_here, bias_here, grad_bias_here = (
                x if x is None or x.shape[0] == 1 else x[part] for x in (visible, bias, grad_bias)
            )
            shape = _Shape(ctx.num_heads, ctx.num_groups, ctx.causal, ctx.scale)
            _gradients(qkv[part], grad[part], grad_qkv[part], visible_here, bias_here, grad_bias_here, shape)
        if cos is not None:
            rotate_(grad_qkv[:, :, : ctx.num_heads + ctx.num_groups], cos, -sin)
        return grad_qkv, None, None, None, grad_bias, None, None, None


@dataclass(frozen=True)
class _Shape:
    num_heads: int
    num_groups: int
    causal: bool
    scale: float


def _gradients(
    qkv: Tensor, grad: Tensor, grad_qkv: Tensor, visible: Tensor | None, bias: Tensor | None, grad_bias: Tensor | None,
    shape: _Shape,
) -> None:  # fmt: skip
    """Gradients of some samples, ``[b, s, heads, d]`` each, written to ``grad_qkv`` and added to ``grad_bias``."""
    b, s, _, d = qkv.shape
    num_heads, num_groups, causal = shape.num_heads, shape.num_groups, shape.causal and bias is None
    repeats = num_heads // num_groups

    def whole(x: Tensor) -> Tensor:
        """``[b, s, heads, d]`` -> ``[b * n, s, d]``, a key head for every query head."""
        x = x.transpose(1, 2)
        x = x if x.shape[1] == num_heads else x.repeat_interleave(repeats, 1)
        return x.reshape(b * num_heads, s, d)

    query, key, value = (whole(x) for x in qkv.split([num_heads, num_groups, num_groups], 2))
    grad = whole(grad)
    grads = [torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)]
    for start in reversed(range(0, s, _QUERIES)):
        rows = slice(start, min(start + _QUERIES, s))
        seen = rows.stop if causal else s
        mask = visible if bias is None else bias[:, :, rows]
        if visible is not None:  # a mask of keys alone has one row for all queries
            mask = ~(visible if visible.shape[2] == 1 else visible[:, :, rows])[..., :seen]
        # The last block sees every key, and is the first to be done: it fills what others add to.
        scores = _block_gradients(
            query, key, value, grad, grads, rows, seen, mask, b, shape.scale, causal=causal, fill=rows.stop == s
        )
        if grad_bias is not None:
            mine, scores = grad_bias[:, :, rows], scores.view(b, num_heads, -1, s)
            summed = scores if mine.shape[0] == b else scores.sum(0, keepdim=True, dtype=mine.dtype)
            mine.add_(summed, alpha=1 / shape.scale)  # the scores' gradient has the scale in it
    for mine, where in zip(grads, grad_qkv.split([num_heads, num_groups, num_groups], 2), strict=True):
        heads = mine.view(b, num_heads, s, d)
        if where.shape[2] != num_heads:
            heads = heads.view(b, num_groups, repeats, s, d).sum(2)
        where.copy_(heads.transpose(1, 2))


def _block_gradients(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, grads: list[Tensor], rows: slice, seen: int,
    hidden: Tensor | None, b: int, scale: float, *, causal: bool, fill: bool,
) -> Tensor:  # fmt: skip
    """What the queries of ``rows`` give to the gradients; keys from ``seen`` on are out of sight.

    ``hidden``: as ``ops.scaled_masked_softmax`` takes it. Returns the gradient of the scores, ``[b * n, rows, seen]``.
    """
    query, grad, key, value = query[:, rows], grad[:, rows], key[:, :seen], value[:, :seen]
    scores = torch.bmm(query, key.transpose(1, 2)).view(b, -1, query.shape[1], seen)
    offset = rows.start if causal and hidden is None else None
    if offset is not None:
        probs = ops.scaled_causal_softmax(scores, scale, offset=offset)
    else:
        probs = ops.scaled_masked_softmax(scores, hidden, scale)
    grad_probs = torch.bmm(grad, value.transpose(1, 2)).view_as(scores)
    grad_scores = ops.softmax_gradient(grad_probs, probs, scale, offset=offset).flatten(0, 1)
    grads[0][:, rows] = torch.bmm(grad_scores, key)
    factors = (grad_scores, query), (probs.flatten(0, 1), grad)
    for whole, (left, right) in zip(grads[1:], factors, strict=True):
        if fill:
            torch.bmm(left.transpose(1, 2), right, out=whole)
        else:
            whole[:, :seen] += torch.bmm(left.transpose(1, 2), right)
    return grad_scores


def attend_blocked(
    qkv: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    visible: Tensor | None,
    num_heads: int,
    *,
    causal: bool = True,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of a whole sequence to itself.

    Args:
        qkv: ``[b, s, heads + 2 * groups, d]``: query, key and value heads.
        rotary: tables of ``RotaryTable.at`` for query and key heads.
        visible: ``[b or 1, 1, s or 1, s]``, True where a token may look; None: everywhere that ``causal`` allows.
        num_heads: query heads.
        causal: no token sees a later one, and ``visible`` says so too.
        bias: ``[b or 1, heads, s, s]``, see ``SequenceInfo``; takes the place of ``visible`` and ``causal``.
        scale: of the scores; unset: ``1 / sqrt(d)``.

    Returns:
        ``[b, s, heads, d]``.
    """
    cos, sin = rotary if rotary is not None else (None, None)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    return _BlockedAttention.apply(qkv, cos, sin, visible, bias, num_heads, causal, scale)
