"""AdamW in one pass over master weights, gradient, both moments and the model's copy."""

from __future__ import annotations

import torch
from torch import Tensor

from mlm_cli.ops import reference, registry

if registry.cpu_loaded:
    from mlm_cli.ops import kernels


@torch.no_grad()
def adamw_(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    model_copy: Tensor | None = None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
) -> None:
    """One AdamW update in place (Loshchilov and Hutter 2019), as ``torch.optim.AdamW``.

    Args:
        master, exp_avg, exp_avg_sq: float32, contiguous, updated in place.
        grad: float32, bfloat16 or float16 with as many elements; used as ``grad * grad_scale``.
        model_copy: receives the updated weights rounded to its dtype, or None.
        step: of this update, from 1.
    """
    update = kernels.adamw_ if registry.serves(master) else reference.adamw_
    update(master, grad, exp_avg, exp_avg_sq, model_copy, lr, beta1, beta2, eps, weight_decay, step, grad_scale)
