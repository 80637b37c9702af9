"""Layer norm, RMS norm, and the fused residual form of both."""

from __future__ import annotations

from torch import Tensor

from mlm_cli.ops import reference


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Layer norm of ``x [..., h]`` over its last dimension; ``weight [h]``, ``bias [h]``."""
    return reference.layer_norm(x, weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """RMS norm of ``x [..., h]`` over its last dimension; ``weight [h]``."""
    return reference.rms_norm(x, weight, eps)


def residual_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout: float = 0.0,
    kind: str = "layernorm",
) -> tuple[Tensor, Tensor]:
    """``new_residual = dropout(x + bias) + residual``; returns ``(norm(new_residual), new_residual)``, each ``[..., h]``."""
    return reference.residual_norm(x, residual, weight, norm_bias, bias, eps, dropout, kind)
