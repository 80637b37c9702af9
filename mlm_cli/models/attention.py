"""Self-attention with heads cut over the tensor group, over torch's fused attention or our softmax kernels."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlm_cli import ops
from mlm_cli.config.initial_std import initial_std
from mlm_cli.config.schema import ModelSection
from mlm_cli.config.shapes import attention_scale, head_dim, num_query_groups
from mlm_cli.errors import UsageError
from mlm_cli.models.blocked_attention import attend_blocked, suits
from mlm_cli.models.cache import LayerCache
from mlm_cli.models.info import SequenceInfo
from mlm_cli.models.rotary import rotate
from mlm_cli.models.sparse import attend_sparse, masked, pattern_of
from mlm_cli.ops import products
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.layers import ColumnParallelLinear, RowParallelLinear
from mlm_cli.parallel.ulysses import collect_heads, deal_heads

if TYPE_CHECKING:
    from mlm_cli.parallel.random import RandomStreams


class Attention(nn.Module):
    """How queries look at keys: which kernels, which scale, with which dropout, kept or worked out again.

    Attributes:
        streams: of dropout inside sliced regions.
        recompute: scores and probabilities are worked out again in the backward pass.
    """

    def __init__(self, model: ModelSection) -> None:
        super().__init__()
        self.kind, self.dropout, self.scale = model.attention.kernel, model.attention_dropout, attention_scale(model)
        self.streams: RandomStreams | None = None
        self.recompute = False

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, info: SequenceInfo, dropout: float) -> Tensor:
        """``query [b, n, s, d]``, ``key, value [b, groups, keys, d]`` -> ``[b, n, s, d]``."""
        if not (self.recompute and torch.is_grad_enabled()):
            return self._attend_once(query, key, value, info, dropout)
        # Selective recomputation (Korthikanti et al. 2022, section 5): most of the memory for little of the work. What
        # is not kept grows with the square of the sequence; query, key and value are.
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": dropout > 0}
        if dropout and self.streams is not None:
            options["context_fn"] = self.streams.recompute_contexts
        return checkpoint(self._attend_once, query, key, value, info, dropout, **options)

    def _attend_once(self, query: Tensor, key: Tensor, value: Tensor, info: SequenceInfo, dropout: float) -> Tensor:
        with self.streams.sliced() if dropout and self.streams is not None else nullcontext():
            return attend(self.kind, query, key, value, info, self.scale, dropout)


class SelfAttention(Attention):
    """Multi-head attention, also with fewer key/value heads than query heads (Ainslie et al. 2023).

    The rows of ``qkv`` are query | key | value, each cut over the tensor group by heads. Context ranks hold a part of
    the tokens each, but in here all tokens of some of these heads: ``num_heads`` and ``num_groups``.
    """

    def __init__(self, model: ModelSection, parallel: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__(model)
        group, dim = parallel.tensor, head_dim(model)
        query, key = model.num_attention_heads * dim, num_query_groups(model) * dim
        options = {"bias": model.bias, "sequence": parallel.sequence, "dtype": dtype, "device": parallel.device}
        self.context, shares = parallel.context, group.size * parallel.context.size
        self.num_heads, self.num_groups, self.dim = query // dim // shares, key // dim // shares, dim
        self.pattern = pattern_of(model)
        blocks, stds = (query, key, key), initial_std(model)
        std = stds.query if stds.query == stds.key else (stds.query, stds.key, stds.key)
        self.qkv = ColumnParallelLinear(model.hidden_size, sum(blocks), group, blocks=blocks, init_std=std, **options)
        self.out = RowParallelLinear(query, model.hidden_size, group, init_std=stds.attention_out, **options)

    def forward(self, x: Tensor, info: SequenceInfo, cache: LayerCache | None = None) -> Tensor:
        """``x [b, s, h]`` -> ``[b, s, h]``; keys and values are added to ``cache`` where there is one."""
        rotated = self.num_heads + self.num_groups
        kinds = [kind * self.context.size for kind in (self.num_heads, self.num_groups, self.num_groups)]
        heads = deal_heads(self.qkv(x).unflatten(-1, (sum(kinds), self.dim)), self.context, *kinds)
        if cache is None:
            heads = products.widened(heads)
        dropout = self.dropout if self.training else 0.0
        plain = cache is None and self.pattern is None and self.kind == "auto" and not dropout
        if plain and suits(heads, info.bias):
            out = attend_blocked(
                heads,
                info.rotary,
                info.visible,
                self.num_heads,
                causal=info.causal,
                bias=info.bias,
                scale=self.scale,
            )
            return self.out(collect_heads(out.to(x.dtype), self.context).flatten(2))
        if info.rotary is None:
            query, key, value = heads.split([self.num_heads, self.num_groups, self.num_groups], 2)
        else:
            pair, value = heads.split([rotated, self.num_groups], 2)
            query, key = rotate(pair, info.rotary).split([self.num_heads, self.num_groups], 2)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # [b, n, s, d]
        if cache is not None:
            key, value = cache.append(key, value, info.offset)
        if self.pattern is None:
            out = self._attend(query, key, value, info, dropout)
        else:
            found = self._attend_sparse(query, key, value, info, dropout, self.pattern, cached=cache is not None)
            if found is None:
                key, value, info = masked(query, key, value, info, self.pattern, cached=cache is not None)
                found = self._attend(query, key, value, info, dropout)
            out = found
        return self.out(collect_heads(out.transpose(1, 2).to(x.dtype), self.context).flatten(2))

    def _attend_sparse(
        self, query: Tensor, key: Tensor, value: Tensor, info: SequenceInfo, dropout: float,
        pattern: ops.SparsePattern, *, cached: bool,
    ) -> Tensor | None:  # fmt: skip
        """``_attend`` at the cost of the pattern; None where the kernel asked for takes the pattern as a mask."""
        if self.kind != "auto":
            return None
        if dropout:
            raise UsageError(
                f"`model.attention.pattern: {pattern.kind}` has no dropout of its probabilities",
                hint="use `model.attention_dropout=0`, or `model.attention.kernel=fused`, which costs as dense",
            )
        return attend_sparse(query, key, value, info, pattern, cached=cached)


def attend(
    kind: str, query: Tensor, key: Tensor, value: Tensor, info: SequenceInfo, scale: float, dropout: float
) -> Tensor:
    """``query [b, n, s, d]``, ``key, value [b, groups, keys, d]`` -> ``[b, n, s, d]``.

    Args:
        kind: ``model.attention``.
        scale: of the scores, before ``info.bias`` is added.
    """
    if products.widens(query):
        wide = (x.float() for x in (query, key, value))
        return attend(kind, *wide, info, scale, dropout).to(query.dtype)
    runs = info.runs if kind == "auto" and info.bias is None and not dropout else None
    if runs is not None and ops.pays_over_dense(query, key, runs):
        return ops.interval_attention(query, key, value, *runs, scale)
    if kind == "auto":
        # torch's attention for the CPU has no dropout: it would fall back to plain, unfused torch code.
        kind = "fused" if dropout and query.device.type == "cpu" else "sdpa"
    if kind == "sdpa":
        mask = info.visible if info.bias is None else info.bias.to(query.dtype)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            mask,
            dropout,
            is_causal=info.causal and mask is None and query.shape[2] > 1,
            scale=scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )
    how = attend_fused if kind == "fused" else attend_reference
    return how(query, key, value, info, dropout, scale)


def _repeat_groups(query: Tensor, *grouped: Tensor) -> list[Tensor]:
    """Key and value heads repeated to one per query head."""
    times = query.shape[1] // grouped[0].shape[1]
    return [x if times == 1 else x.repeat_interleave(times, 1) for x in grouped]


def attend_fused(
    query: Tensor, key: Tensor, value: Tensor, info: SequenceInfo, dropout: float, scale: float | None = None
) -> Tensor:
    """Attention around the fused softmax kernels: scores exist, their masked and scaled copies do not."""
    key, value = _repeat_groups(query, key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ key.transpose(-1, -2)
    if info.bias is not None:
        probs = ops.scaled_masked_softmax(scores, info.bias, scale, dropout)
    elif info.causal and info.visible is None:
        probs = ops.scaled_causal_softmax(scores, scale, offset=info.offset, dropout=dropout)
    else:
        probs = ops.scaled_masked_softmax(scores, None if info.visible is None else ~info.visible, scale, dropout)
    return probs @ value


def attend_reference(
    query: Tensor, key: Tensor, value: Tensor, info: SequenceInfo, dropout: float, scale: float | None = None
) -> Tensor:
    """Attention as written in Vaswani et al. 2017, section 3.2.1, in float32."""
    key, value = _repeat_groups(query, key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query.float() @ key.float().transpose(-1, -2) * scale
    visible = info.visible
    if info.bias is not None:
        scores = scores + info.bias
    elif visible is None and info.causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril_(info.offset)
    if visible is not None:  # a row that sees nothing is zero, as in the kernels
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    probs = torch.softmax(scores, -1)
    if visible is not None:
        probs = probs.masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return (F.dropout(probs, dropout) @ value.float()).to(query.dtype)
