"""The one transformer layer: GPT-2, Llama and BERT are settings of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlm_cli import ops
from mlm_cli.config.schema import ModelSection
from mlm_cli.config.shapes import ffn_hidden_size, has_experts, is_gated, output_init_std
from mlm_cli.models.attention import SelfAttention
from mlm_cli.models.cache import LayerCache
from mlm_cli.models.experts import Experts
from mlm_cli.models.info import SequenceInfo
from mlm_cli.parallel.context import Group, ParallelContext
from mlm_cli.parallel.layers import ColumnParallelLinear, RowParallelLinear, new_parameter
from mlm_cli.parallel.mappings import copy_to_group

# A context in which to draw dropout masks for what lies between sliced layers.
Masks = Callable[[], AbstractContextManager[None]]


class Norm(nn.Module):
    """Layer norm or RMS norm over the last dimension, equal on all tensor ranks.

    ``sequence``: the group that tokens are shared out over here; unset: that of the model between sliced layers.
    """

    def __init__(
        self, model: ModelSection, parallel: ParallelContext, dtype: torch.dtype, *, sequence: Group | None = None
    ) -> None:
        super().__init__()
        device, self.sequence = parallel.device, parallel.sequence if sequence is None else sequence
        self.kind, self.eps = model.norm, model.norm_eps
        self.weight = new_parameter(model.hidden_size, init="ones", dtype=dtype, device=device)
        with_bias = model.norm == "layernorm"
        self.bias = new_parameter(model.hidden_size, init="zeros", dtype=dtype, device=device) if with_bias else None

    def _parameters_here(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias; their gradients are summed where each rank has seen a part of the tokens."""
        bias = None if self.bias is None else copy_to_group(self.bias, self.sequence)
        return copy_to_group(self.weight, self.sequence), bias

    def forward(self, x: Tensor, info: SequenceInfo | None = None) -> Tensor:
        """``info`` is not looked at: the final norm is called as any entry of the layer list."""
        weight, bias = self._parameters_here()
        if self.kind == "rmsnorm":
            return ops.rms_norm(x, weight, self.eps)
        return ops.layer_norm(x, weight, bias, self.eps)

    def after(self, branch: Tensor, residual: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
        """Close a residual branch and norm the sum, in one pass: (norm, ``dropout(branch) + residual``)."""
        weight, bias = self._parameters_here()
        return ops.residual_norm(branch, residual, weight, bias, eps=self.eps, dropout=dropout, kind=self.kind)


class MLP(nn.Module):
    """Feed-forward layer, its inner width cut over the tensor group; gated ones have rows gate | up."""

    def __init__(self, model: ModelSection, parallel: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        group, width = parallel.tensor, ffn_hidden_size(model)
        options = {"sequence": parallel.sequence, "dtype": dtype, "device": parallel.device}
        self.activation = model.activation
        blocks = (width, width) if is_gated(model) else (width,)
        self.up = ColumnParallelLinear(
            model.hidden_size, sum(blocks), group, bias=model.bias, blocks=blocks, init_std=model.init_std, **options
        )
        std = output_init_std(model)
        self.down = RowParallelLinear(width, model.hidden_size, group, bias=model.bias, init_std=std, **options)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation == "swiglu":
            return self.down(ops.swiglu(self.up(x)))
        if self.activation == "geglu":
            gate, up = self.up(x).chunk(2, -1)
            return self.down(ops.bias_gelu(gate, None) * up)
        if self.activation == "relu":
            return self.down(F.relu(self.up(x)))
        gelu = ops.bias_gelu if self.activation == "gelu" else ops.bias_gelu_erf
        return self.down(gelu(self.up.without_bias(x), self.up.bias))


class Block(nn.Module):
    """Two residual branches, attention and feed-forward, each with a norm.

    Pre-norm (Radford et al. 2019; Megatron-LM, also for BERT): ``x + attention(norm1(x))``, then ``x + mlp(norm2(x))``.
    Post-norm (Vaswani et al. 2017; the original BERT): ``norm1(x + attention(x))``, then ``norm2(x + mlp(x))``.

    Args:
        number: of the layer, from 0: some may have a mixture of experts.
    """

    gathers_children = True  # ZeRO-3: parameters are used by other ways than their module's forward

    def __init__(self, model: ModelSection, parallel: ParallelContext, dtype: torch.dtype, number: int = 0) -> None:
        super().__init__()
        self.hidden_dropout, self.post_norm = model.hidden_dropout, model.norm_order == "post"
        self.masks: Masks = nullcontext
        self.norm1 = Norm(model, parallel, dtype)
        self.attention = SelfAttention(model, parallel, dtype)
        self.norm2 = Norm(model, parallel, dtype)
        self.mlp: nn.Module = (Experts if has_experts(model, number) else MLP)(model, parallel, dtype)

    def forward(self, x: Tensor, info: SequenceInfo, cache: LayerCache | None = None) -> Tensor:
        """``x [b, s, h]`` -> ``[b, s, h]``."""
        dropout = self.hidden_dropout if self.training else 0.0
        if self.post_norm:
            return self._post(x, info, cache, dropout)
        branch = self.attention(self.norm1(x), info, cache)
        with self.masks():
            normed, x = self.norm2.after(branch, x, dropout)
        branch = self.mlp(normed)
        with self.masks():
            return x + (F.dropout(branch, dropout) if dropout else branch)

    def _post(self, x: Tensor, info: SequenceInfo, cache: LayerCache | None, dropout: float) -> Tensor:
        branch = self.attention(x, info, cache)
        with self.masks():
            x, _ = self.norm1.after(branch, x, dropout)
        branch = self.mlp(x)
        with self.masks():
            return self.norm2.after(branch, x, dropout)[0]
