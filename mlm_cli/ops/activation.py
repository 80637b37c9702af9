"""Activations of the feed-forward layer with the bias fused in."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mlm_cli.ops import reference


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU (tanh form) of ``x [..., h] + bias [h]``."""
    return reference.bias_gelu(x, bias)


def bias_gelu_erf(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU (exact form) of ``x [..., h] + bias [h]``; plain torch."""
    return F.gelu(x if bias is None else x + bias)


def swiglu(x: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``x [..., 2f] = [gate | up]``, giving ``[..., f]``."""
    return reference.swiglu(x)
