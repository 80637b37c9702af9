"""Sliced layers of Megatron-LM (Shoeybi et al. 2019, section 3): column, row, and vocabulary-sliced embedding.

A column layer followed by a row layer needs one all-reduce forward and one backward. Each layer states how its
parameters are cut (``param.shard``) and drawn (``param.init``); nothing here draws random numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlm_cli.ops.int8 import dequantize_rows
from mlm_cli.parallel.context import SOLO, Group
from mlm_cli.parallel.linear import linear
from mlm_cli.parallel.mappings import copy_to_group, reduce_from_group
from mlm_cli.parallel.sequence import gathered_linear, reduce_scatter_tokens
from mlm_cli.parallel.shard import Shard


def new_parameter(
    *shape: int,
    init: float | str | tuple[float, ...],
    shard: Shard | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Parameter:
    """An unfilled parameter that knows how it is cut and drawn. ``shape`` is that of this rank's slice."""
    param = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
    param.shard = shard  # type: ignore[attr-defined]
    param.init = init  # type: ignore[attr-defined]
    # DeepSpeed and Megatron count a sliced parameter on every rank when they take a gradient norm, others once.
    param.tensor_model_parallel = shard is not None  # type: ignore[attr-defined]
    param.model_parallel = shard is not None  # type: ignore[attr-defined]
    return param


class ParallelLinear(nn.Module):
    """What sliced linear layers share: a matrix that may be held as int8, to be read and not to be trained.

    Attributes:
        weight: this rank's slice ``[out, in]``.
        weight_scale: ``[out]``, where ``weight`` is int8: what each row is multiplied with; else None.
    """

    weight: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight_scale", None, persistent=False)

    def hold_int8(self, scale_dtype: torch.dtype) -> None:
        """Put int8 and scales, both unfilled, in the place of the weight."""
        shape, device = self.weight.shape, self.weight.device
        codes = nn.Parameter(torch.empty(shape, dtype=torch.int8, device=device), requires_grad=False)
        codes.shard = self.weight.shard  # type: ignore[attr-defined]
        self.weight = codes
        self.weight_scale = torch.empty(shape[0], dtype=scale_dtype, device=device)

    def hold_floats(self, dtype: torch.dtype) -> None:
        """Put the matrix that int8 and scales stand for in their place."""
        if self.weight_scale is not None:
            matrix = nn.Parameter(self.matrix(dtype), requires_grad=False)
            matrix.shard = self.weight.shard  # type: ignore[attr-defined]
            self.weight, self.weight_scale = matrix, None

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight; of int8, the matrix in ``dtype`` that it stands for, made at each call."""
        return self.weight if self.weight_scale is None else dequantize_rows(self.weight, self.weight_scale, dtype)


class ColumnParallelLinear(ParallelLinear):
    """``y = x A^T + b`` with the rows of ``A`` cut over ``group``: each rank gives its part of the outputs.

    Args:
        blocks: full sizes of the parts of the output that are cut separately (see ``Shard``).
        init_std: of initial weights; may be one for each block.
        sequence: the group that the tokens of ``x`` are shared out over (see ``parallel.sequence``).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group: Group,
        *,
        sequence: Group = SOLO,
        bias: bool = True,
        blocks: tuple[int, ...] | None = None,
        init_std: float | tuple[float, ...] = 0.02,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.group, self.in_features, self.out_features = group, in_features, out_features
        self._linear = linear if sequence.size == 1 else gathered_linear
        shard, rows = Shard(0, blocks), out_features // group.size
        self.weight = new_parameter(rows, in_features, init=init_std, shard=shard, dtype=dtype, device=device)
        self.bias = new_parameter(rows, init="zeros", shard=shard, dtype=dtype, device=device) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in]`` (equal on all ranks) -> ``[..., out / size]``."""
        return self._linear(x, self.matrix(x.dtype), self.bias, self.group)

    def without_bias(self, x: Tensor) -> Tensor:
        """The product alone, for a following operator that adds ``bias`` on its way."""
        return self._linear(x, self.matrix(x.dtype), None, self.group)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, rank {self.group.rank} of {self.group.size}"


class RowParallelLinear(ParallelLinear):
    """``y = x A^T + b`` with the columns of ``A`` cut over ``group``: partial products are summed over the ranks.

    Args:
        sequence: the group that the tokens of ``y`` are shared out over.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group: Group,
        *,
        sequence: Group = SOLO,
        bias: bool = True,
        init_std: float = 0.02,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.group, self.in_features, self.out_features = group, in_features, out_features
        columns = in_features // group.size
        self.weight = new_parameter(out_features, columns, init=init_std, shard=Shard(1), dtype=dtype, device=device)
        self.bias = new_parameter(out_features, init="zeros", dtype=dtype, device=device) if bias else None
        # The bias is added once: inside the product where that is the whole sum, after the reduction otherwise.
        self.fused_bias = group.size == 1
        self.sequence = sequence
        self._reduce = reduce_from_group if sequence.size == 1 else reduce_scatter_tokens

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in / size]`` -> ``[..., out]``, equal on all ranks."""
        if self.fused_bias:
            return linear(x, self.matrix(x.dtype), self.bias, SOLO)
        out = self._reduce(linear(x, self.matrix(x.dtype), None, SOLO), self.group)
        return out if self.bias is None else out + copy_to_group(self.bias, self.sequence)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, rank {self.group.rank} of {self.group.size}"


class VocabParallelEmbedding(nn.Module):
    """Rows of a word embedding cut over ``group``; rows from ``vocab_size`` to ``padded_size`` are never read.

    Args:
        sequence: the group that the embedded tokens are shared out over.
    """

    def __init__(
        self,
        vocab_size: int,
        padded_size: int,
        hidden_size: int,
        group: Group,
        *,
        sequence: Group = SOLO,
        init_std: float = 0.02,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.group, self.vocab_size, self.padded_size = group, vocab_size, padded_size
        rows = padded_size // group.size
        self.start = group.rank * rows
        self._reduce = reduce_from_group if sequence.size == 1 else reduce_scatter_tokens
        shard = Shard(0, valid=vocab_size)
        self.weight = new_parameter(rows, hidden_size, init=init_std, shard=shard, dtype=dtype, device=device)

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens [b, s]`` -> ``[b, s, h]``, equal on all ranks."""
        if self.group.size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.start
        outside = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill(outside, 0), self.weight).masked_fill(outside[..., None], 0.0)
        return self._reduce(rows, self.group)

    def extra_repr(self) -> str:
        return f"{self.vocab_size} (padded {self.padded_size}), rank {self.group.rank} of {self.group.size}"
