"""Plain-torch references of every operator: what the kernels must agree with, and what runs where no kernel was built.

All accumulate in float32 (float64 input stays float64) and return the dtype of their input. Gradients are torch's own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    """float32 for the half precisions, unchanged for float32 and float64."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Ba et al. 2016, over the last dimension of ``x [..., h]``."""
    wide = _wide(x)
    out = F.layer_norm(wide, (x.shape[-1],), weight.to(wide.dtype), None if bias is None else bias.to(wide.dtype), eps)
    return out.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Zhang and Sennrich 2019, over the last dimension of ``x [..., h]``."""
    wide = _wide(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype)


def residual_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout: float,
    kind: str,
) -> tuple[Tensor, Tensor]:
    """``new_residual = dropout(x + bias) + residual`` and its norm."""
    branch = x if bias is None else x + bias.to(x.dtype)
    total = F.dropout(branch, dropout, training=dropout > 0) + residual
    normed = rms_norm(total, weight, eps) if kind == "rmsnorm" else layer_norm(total, weight, norm_bias, eps)
    return normed, total


def _softmax_rows(scores: Tensor, dropout: float, dtype: torch.dtype) -> Tensor:
    """Softmax over the last dimension where a row of nothing but -inf gives zeros (and a zero gradient), not NaN."""
    if scores.shape[-1] == 0:
        return scores.to(dtype)
    dead = scores.amax(-1, keepdim=True) == -math.inf
    probs = torch.softmax(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
    return F.dropout(probs, dropout, training=dropout > 0).to(dtype)


def scaled_masked_softmax(scores: Tensor, mask: Tensor | None, scale: float, dropout: float) -> Tensor:
    """``softmax(scores * scale)`` with ``mask`` True = hidden, or added when it is a float."""
    wide = _wide(scores) * scale
    if mask is not None:
        wide = wide.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else wide + mask.to(wide.dtype)
    return _softmax_rows(wide, dropout, scores.dtype)


def causal_hidden(queries: int, keys: int, offset: int, window: int | None, device: torch.device) -> Tensor:
    """Boolean ``[queries, keys]``, True where the key is hidden: after the query, or ``window`` or more before it."""
    distance = torch.arange(queries, device=device)[:, None] + offset - torch.arange(keys, device=device)[None, :]
    hidden = distance < 0
    return hidden if window is None else hidden | (distance >= window)


def interval_attention(query: Tensor, key: Tensor, value: Tensor, begin: Tensor, end: Tensor, scale: float) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    place = torch.arange(key.shape[2], device=key.device)
    hidden = (place < begin[:, None, :, None]) | (place >= end[:, None, :, None])
    return scaled_masked_softmax(query @ key.transpose(-1, -2), hidden, scale, 0.0) @ value


def softmax_gradient(grad: Tensor, probs: Tensor, scale: float) -> Tensor:
    """``probs * (grad - sum(grad * probs)) * scale``"""
    grad, wide = _wide(grad), _wide(probs)
    return (wide * (grad - (grad * wide).sum(-1, keepdim=True)) * scale).to(probs.dtype)


def scaled_causal_softmax(scores: Tensor, scale: float, offset: int, window: int | None, dropout: float) -> Tensor:
    """Softmax where query ``i`` sees keys ``i + offset - window < j <= i + offset``."""
    hidden = causal_hidden(scores.shape[-2], scores.shape[-1], offset, window, scores.device)
    return _softmax_rows((_wide(scores) * scale).masked_fill(hidden, -math.inf), dropout, scores.dtype)


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU in the tanh form (Hendrycks and Gimpel 2016, section 2) of ``x + bias``."""
    wide = _wide(x)
    wide = wide if bias is None else wide + bias.to(wide.dtype)
    return F.gelu(wide, approximate="tanh").to(x.dtype)


def swiglu(x: Tensor) -> Tensor:
    """``silu(gate) * up`` for ``x = [gate | up]`` (Shazeer 2020)."""
    gate, up = _wide(x).chunk(2, -1)
    return (F.silu(gate) * up).to(x.dtype)


def cross_entropy_stats(
    logits: Tensor, labels: Tensor, vocab_start: int, num_valid: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum, sum of exponentials and the label's logit over the valid columns of a vocabulary slice."""
    wide = _wide(logits[:, :num_valid])
    rows = logits.shape[0]
    if num_valid == 0:
        zero = wide.new_zeros(rows)
        return torch.full_like(zero, -math.inf), zero, zero.clone()
    highest = wide.amax(-1)
    total = torch.exp(wide - highest.masked_fill(highest == -math.inf, 0.0)[:, None]).sum(-1)
    local = labels - vocab_start
    inside = (local >= 0) & (local < num_valid)
    target = wide.gather(1, local.clamp(0, num_valid - 1)[:, None])[:, 0].masked_fill(~inside, 0.0)
    return highest, total, target


def cross_entropy_grad_(
    logits: Tensor, labels: Tensor, lse: Tensor, scale: Tensor, vocab_start: int, num_valid: int
) -> Tensor:
    """``logits <- (softmax - onehot) * scale``; columns from ``num_valid`` on become zero."""
    wide = _wide(logits[:, :num_valid])
    grad = torch.exp(wide - lse.to(wide.dtype)[:, None])
    local = labels - vocab_start
    inside = (local >= 0) & (local < num_valid)
    rows = torch.arange(logits.shape[0], device=logits.device)[inside]
    grad[rows, local[inside]] -= 1.0
    logits[:, :num_valid] = (grad * scale.to(wide.dtype)[:, None]).to(logits.dtype)
    logits[:, num_valid:] = 0
    return logits


def adamw_(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    model_copy: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
) -> None:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2), in the order of operations of ``torch.optim.AdamW``."""
    wide = grad.to(master.dtype) * grad_scale
    master.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(wide, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(wide, wide, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
    master.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
    if model_copy is not None:
        model_copy.copy_(master)
