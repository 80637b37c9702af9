"""Activations of the feed-forward layer with the bias fused in."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mlm_cli.ops import reference, registry

if registry.cpu_loaded:
    from mlm_cli.ops import kernels


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU, tanh form (Hendrycks and Gimpel 2016, section 2), of ``x [..., h] + bias [h]``."""
    if registry.serves(x):
        return kernels.bias_gelu(x, bias)
    return reference.bias_gelu(x, bias)


def bias_gelu_erf(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU (exact form) of ``x [..., h] + bias [h]``; plain torch."""
    return F.gelu(x if bias is None else x + bias)


def swiglu(x: Tensor) -> Tensor:
    """``silu(gate) * up`` (Shazeer 2020) of ``x [..., 2f] = [gate | up]``, giving ``[..., f]``."""
    if registry.serves(x):
        return kernels.swiglu(x)
    return reference.swiglu(x)
