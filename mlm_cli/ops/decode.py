"""One token a row through a whole GPT in one call: the decoding step of generation on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlm_cli.ops import registry

_ACTIVATIONS = {"gelu": 0, "gelu_erf": 1, "swiglu": 2}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def serves_decode_step(dtype: torch.dtype, device: torch.device) -> bool:
    """True where ``DecodeStep`` has a kernel. Elsewhere the layers run one by one: they are its reference."""
    return device.type == "cpu" and dtype in _DTYPES and registry.cpu_loaded


class DecodeStep:
    """The fused decoding step over given weights and caches. Inference only, no gradient.

    Args:
        weights: word and position embedding, final norm (weight, bias), output layer, then for each layer weight and
            bias of norm1, qkv, out, norm2, up, down. An empty tensor where there is none. One dtype, all packed; but
            matrices of layers may be int8.
        scales: for each layer, of qkv, out, up, down: float32 ``[out]`` where that matrix is int8, else empty.
        cache: keys, values of each layer in turn, ``[slots, groups, capacity, d]``; row r of a step is slot r.
        rotary: cosines and sines, float32 ``[positions, d / 2]`` each; None with learned positions.
        activation: ``gelu``, ``gelu_erf`` or ``swiglu``.
        rms: RMS norms instead of layer norms.

    Raises:
        RuntimeError: tensors that do not fit together.

    Activations are float32 whatever the dtype of the weights, and codes of int8 are multiplied as float32 numbers:
    memory is saved, and the time of reading it. A step reads every weight once, several rows at a time, and needs
    scratch memory for the activations of one layer only.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        scales: Sequence[Tensor],
        cache: Sequence[Tensor],
        rotary: tuple[Tensor, Tensor] | None,
        *,
        heads: int,
        groups: int,
        dim: int,
        vocab_size: int,
        activation: str,
        rms: bool,
        eps: float,
    ) -> None:
        # The plan knows addresses only: these tensors live as long as it does.
        self._kept = (list(weights), list(scales), list(cache), rotary)
        cos, sin = rotary if rotary is not None else (None, None)
        sizes = (heads, groups, dim, vocab_size, _ACTIVATIONS[activation], rms, eps)
        self._plan: Tensor = torch.ops.mlm.decode_plan.default(*self._kept[:3], cos, sin, *sizes)
        self._run = torch.ops.mlm.decode_step.default

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits, float32 ``[b, vocab_size]``, of what follows ``tokens [b]`` (int64).

        ``positions [b]``: how many tokens each row has stored already; the new key and value are stored there.
        """
        logits: Tensor = self._run(self._plan, tokens, positions)
        return logits
