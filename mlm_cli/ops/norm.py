"""Layer norm, RMS norm, and the fused residual form of both."""

from __future__ import annotations

from torch import Tensor

from mlm_cli.ops import reference, registry
from mlm_cli.ops.autograd import dropout_seed

if registry.cpu_loaded:
    from mlm_cli.ops import kernels

KINDS = ("layernorm", "rmsnorm")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Layer norm (Ba et al. 2016) of ``x [..., h]`` over its last dimension; ``weight [h]``, ``bias [h]``."""
    if registry.serves(x):
        return kernels.layer_norm(x, weight, bias, eps)
    return reference.layer_norm(x, weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """RMS norm (Zhang and Sennrich 2019) of ``x [..., h]`` over its last dimension; ``weight [h]``."""
    if registry.serves(x):
        return kernels.rms_norm(x, weight, eps)
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
    """``new_residual = dropout(x + bias) + residual`` and its norm, in one pass over memory.

    Args:
        x, residual: ``[..., h]``, of one shape and dtype.
        weight, norm_bias: of the norm, ``[h]``; ``norm_bias`` is for ``kind="layernorm"`` only.
        bias: added to ``x`` before the dropout, ``[h]``.
        dropout: probability; the mask comes from torch's generator and is made again in the backward pass.
        kind: ``layernorm`` or ``rmsnorm``.

    Returns:
        ``(norm(new_residual), new_residual)``.

    Raises:
        ValueError: an unknown kind, or a bias for RMS norm.
    """
    if kind not in KINDS:
        raise ValueError(f"residual_norm: `kind` must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "rmsnorm" and norm_bias is not None:
        raise ValueError("residual_norm: `norm_bias` must be None with kind='rmsnorm', which has no bias")
    if registry.serves(x):
        seed = dropout_seed(x, dropout)
        return kernels.residual_norm(x, residual, weight, norm_bias, bias, seed, eps, dropout, kind == "rmsnorm")
    return reference.residual_norm(x, residual, weight, norm_bias, bias, eps, dropout, kind)
