"""AdamW in one pass over master weights, gradient, both moments and the model's copy."""

from __future__ import annotations

import torch
from torch import Tensor

from mlm_cli.ops import reference


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
    """One AdamW update in place, as ``torch.optim.AdamW``; ``step`` counts from 1, the gradient is times ``grad_scale``.

    ``master``, ``exp_avg``, ``exp_avg_sq`` are float32, ``grad`` float32 or bfloat16; ``model_copy`` (bfloat16 or any
    float) receives the updated weights. All have the same number of elements.
    """
    reference.adamw_(
        master, grad, exp_avg, exp_avg_sq, model_copy, lr, beta1, beta2, eps, weight_decay, step, grad_scale
    )
