"""The model's weights laid out for the fused decoding step.

This is no second definition of the model: it holds the very parameters of the layers, and only of layers it knows in
full. Where anything is unknown, or sliced, or on a GPU, the layers themselves run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mlm_cli import ops
from mlm_cli.config.shapes import is_sparse, turns_by_length
from mlm_cli.generation.slots import Slots
from mlm_cli.models.attention import SelfAttention
from mlm_cli.models.block import MLP, Block, Norm
from mlm_cli.models.contrast import Contrast
from mlm_cli.models.embedding import Embedding, Position
from mlm_cli.models.gpt import GPT, Head
from mlm_cli.parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

_KNOWN = {  # `Contrast` does nothing outside of training
    GPT, nn.ModuleList, Embedding, VocabParallelEmbedding, Position, Block, Norm, SelfAttention, ColumnParallelLinear,
    RowParallelLinear, MLP, Head, Contrast,
}  # fmt: skip


class StepPlan:
    """Runs one decoding step of ``model`` through ``ops.DecodeStep``. Made by ``of``.

    Attributes:
        most_rows: with more of them the layers are the faster way.
    """

    def __init__(self, model: GPT, max_length: int) -> None:
        config, block = model.config, model.layers[0]
        assert isinstance(block, Block)
        first = block.attention
        self._weights, self._scales = _weights(model), _scales(model)
        is_int8 = any(scale.numel() for scale in self._scales)  # else the layers would make every matrix at every token
        self.most_rows = 64 if is_int8 else _most_rows(model.dtype)
        self._step: ops.DecodeStep | None = None
        self._cache: list[Tensor] = []
        self._rotary: tuple[Tensor, Tensor] | None = None
        if model._rotary is not None:
            cos, sin = model._rotary.at(torch.arange(max_length), torch.float32)
            self._rotary = cos.squeeze(1).contiguous(), sin.squeeze(1).contiguous()
        self._shape: dict[str, Any] = {
            "heads": first.num_heads,
            "groups": first.num_groups,
            "dim": first.dim,
            "vocab_size": model.vocab_size,
            "activation": config.activation,
            "rms": config.norm == "rmsnorm",
            "eps": config.norm_eps,
        }

    @staticmethod
    def of(model: GPT, max_length: int) -> StepPlan | None:
        """The plan of a model, or None where its layers must run one by one."""
        device, config = model.parallel.device, model.config
        if config.activation not in ("gelu", "gelu_erf", "swiglu") or config.norm_order != "pre":
            return None
        if is_sparse(config) or turns_by_length(config):
            return None  # it attends to every key, by rotations that are the same whatever the length
        if model.parallel.tensor.size > 1 or not ops.serves_decode_step(model.dtype, device):
            return None
        if any(type(module) not in _KNOWN or _is_hooked(module) for module in model.modules()):
            return None
        used = {weight.data_ptr() for weight in _weights(model) if weight.numel()}
        if used != {param.data_ptr() for param in model.parameters()}:
            return None
        return StepPlan(model, max_length)

    def logits(self, tokens: Tensor, slots: Slots) -> Tensor:
        """After ``slots.begin_step()``: tokens [b] -> float32 logits [b, vocab_size]; keys and values are stored."""
        if self._step is None or self._cache is not slots.tensors:  # the cache has grown
            self._cache = slots.tensors
            self._step = ops.DecodeStep(self._weights, self._scales, self._cache, self._rotary, **self._shape)
        return self._step(tokens, slots.positions)


def _most_rows(dtype: torch.dtype) -> int:
    """Where a step computes more than it reads, and the general matrix product is the better one.

    In bfloat16 that is soon: from some 48 rows with AVX-512, and from 16 with the matrix unit (AMX).
    """
    if dtype == torch.float32:
        return 64
    return 16 if getattr(torch.cpu, "_is_amx_tile_supported", bool)() else 32


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _weights(model: GPT) -> list[Tensor]:
    nothing = torch.empty(0, dtype=model.dtype)

    def pair(module: nn.Module) -> list[Tensor]:
        bias = getattr(module, "bias", None)
        return [module.weight.detach(), nothing if bias is None else bias.detach()]  # type: ignore[operator]

    position = model.embedding.position
    found = [model.embedding.word.weight.detach(), nothing if position is None else position.weight.detach()]
    found += [*pair(model.final_norm), model.output_weight.detach()]
    for layer in model.layers:
        assert isinstance(layer, Block)
        attention, mlp = layer.attention, layer.mlp
        for module in (layer.norm1, attention.qkv, attention.out, layer.norm2, mlp.up, mlp.down):
            found += pair(module)
    return found


def _scales(model: GPT) -> list[Tensor]:
    """Scales of the matrices that are int8, in the order of a layer's matrices."""
    found = []
    for layer in model.layers:
        assert isinstance(layer, Block) and isinstance(layer.mlp, MLP)
        for module in (layer.attention.qkv, layer.attention.out, layer.mlp.up, layer.mlp.down):
            scale = module.weight_scale
            found.append(torch.empty(0) if scale is None else scale.float().contiguous())
    return found
