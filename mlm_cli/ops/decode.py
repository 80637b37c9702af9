"""One token a row through a whole GPT in one call: the decoding step of generation on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from mlm_cli.ops import registry

_ACTIVATIONS = {"gelu": 0, "gelu_erf": 1, "swiglu": 2}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def serves_decode_step(dtype: torch.dtype, device: torch.device) -> bool:
    """True where ``decode_step`` has a kernel. Elsewhere the layers run one by one: they are its reference."""
    return device.type == "cpu" and dtype in _DTYPES and registry.cpu_loaded


def decode_step(
    tokens: Tensor,
    positions: Tensor,
    weights: list[Tensor],
    cache: list[Tensor],
    rotary: tuple[Tensor, Tensor] | None,
    *,
    heads: int,
    groups: int,
    dim: int,
    vocab_size: int,
    activation: str,
    rms: bool,
    eps: float,
) -> Tensor:
    """Logits, float32 ``[b, vocab_size]``, of the token that follows ``tokens [b]``. Inference only, no gradient.

    Args:
        tokens: int64 ids, one a row; row r is slot r of the cache.
        positions: int64 ``[b]``: tokens the row has stored already; the new key and value go there.
        weights: word and position embedding, final norm (weight, bias), output layer, then for each layer weight and
            bias of norm1, qkv, out, norm2, up, down. An empty tensor where there is none. One dtype, all packed.
        cache: keys, values of each layer in turn, ``[slots, groups, capacity, d]``; written to.
        rotary: cosines and signed sines, float32 ``[positions, d]`` each, as of ``models.rotary``.
        activation: ``gelu``, ``gelu_erf`` or ``swiglu``.
        rms: RMS norms instead of layer norms.

    Activations are float32 whatever the dtype of the weights. Reads every weight once, in rows of four at a time; needs
    scratch memory for the activations of one layer only.
    """
    cos, sin = rotary if rotary is not None else (None, None)
    logits: Tensor = torch.ops.mlm.decode_step.default(
        tokens, positions, weights, cache, cos, sin, heads, groups, dim, vocab_size, _ACTIVATIONS[activation], rms, eps
    )
    return logits
