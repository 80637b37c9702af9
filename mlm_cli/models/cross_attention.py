"""Attention of a decoder to what an encoder has read, and the decoder layer around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mlm_cli.config.initial_std import initial_std
from mlm_cli.config.schema import ModelSection
from mlm_cli.config.shapes import head_dim
from mlm_cli.models.attention import Attention
from mlm_cli.models.block import Block, Norm
from mlm_cli.models.cache import LayerCache
from mlm_cli.models.info import SequenceInfo
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.layers import ColumnParallelLinear, RowParallelLinear


class CrossAttention(Attention):
    """Queries of one sequence, keys and values of another (Vaswani et al. 2017, section 3.2.3).

    The rows of ``kv`` are key | value, each cut over the tensor group by heads, as those of ``query``.
    """

    def __init__(self, model: ModelSection, parallel: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__(model)
        group, dim = parallel.tensor, head_dim(model)
        width, h, stds = model.num_attention_heads * dim, model.hidden_size, initial_std(model)
        options = {"bias": model.bias, "sequence": parallel.sequence, "dtype": dtype, "device": parallel.device}
        self.num_heads, self.dim = model.num_attention_heads // group.size, dim
        self.query = ColumnParallelLinear(h, width, group, init_std=stds.query, **options)
        self.kv = ColumnParallelLinear(h, 2 * width, group, blocks=(width, width), init_std=stds.key, **options)
        self.out = RowParallelLinear(width, h, group, init_std=stds.attention_out, **options)

    def keys(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of ``context [b, keys, h]``, ``[b, n, keys, d]`` each."""
        heads = self.kv(context).unflatten(-1, (2 * self.num_heads, self.dim)).transpose(1, 2)
        key, value = heads.chunk(2, 1)
        return key, value

    def forward(self, x: Tensor, keys: tuple[Tensor, Tensor], info: SequenceInfo) -> Tensor:
        """``x [b, s, h]`` and what ``keys`` gave -> ``[b, s, h]``; ``info.visible`` is of the keys."""
        query = self.query(x).unflatten(-1, (self.num_heads, self.dim)).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        out = self._attend(query, *keys, info, dropout)
        return self.out(out.transpose(1, 2).flatten(2))


class DecoderBlock(Block):
    """A pre-norm layer with a third residual branch, attention to the encoder, between the other two."""

    def __init__(self, model: ModelSection, parallel: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__(model, parallel, dtype)
        assert not self.post_norm
        self.norm_cross = Norm(model, parallel, dtype)
        self.cross = CrossAttention(model, parallel, dtype)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        context: Tensor | tuple[Tensor, Tensor],
        info: SequenceInfo,
        cross_info: SequenceInfo,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """``x [b, s, h]`` -> ``[b, s, h]``.

        Args:
            context: the encoder's states ``[b, keys, h]``, or what ``cross.keys`` made of them.
            info, cross_info: of the decoder's tokens, and of the encoder's as keys.
            cache: keys and values of the decoder's earlier tokens.
        """
        dropout = self.hidden_dropout if self.training else 0.0
        branch = self.attention(self.norm1(x), info, cache)
        with self.masks():
            normed, x = self.norm_cross.after(branch, x, dropout)
        keys = context if isinstance(context, tuple) else self.cross.keys(context)
        branch = self.cross(normed, keys, cross_info)
        with self.masks():
            normed, x = self.norm2.after(branch, x, dropout)
        branch = self.mlp(normed)
        with self.masks():
            return x + (F.dropout(branch, dropout) if dropout else branch)
