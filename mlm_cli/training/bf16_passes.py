"""Fewer passes of DeepSpeed's ``BF16_Optimizer`` over its float32 gradients, which the memory's rate decides.

It adds a micro-batch's gradients to zeros, clips those that other ranks step on, too, and zeroes all of them twice an
update. Here the first gradient of an update is copied, each rank clips its own share, and nothing is zeroed but what
had no gradient. The numbers are the same, bit for bit (but for the sign of a zero).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_NEEDED = (
    "fp32_groups_gradients", "fp32_groups_has_gradients", "fp32_groups_gradient_flat_partition", "_update_hp_grad",
    "clear_hp_grads", "get_grads_for_norm", "get_grads_for_reduction", "overflow",
)  # fmt: skip


def install(optimizer: Any) -> bool:
    """Replace these methods of one optimizer; returns whether it is one that has them, and whose gradients are reduced.

    Left as they are: other optimizers and versions of DeepSpeed, experts over ranks, and a single data rank, for
    which nothing is reduced.
    """
    if type(optimizer).__name__ != "BF16_Optimizer" or not all(hasattr(optimizer, name) for name in _NEEDED):
        return False
    if optimizer.has_moe_layers or getattr(optimizer, "autoep_folding_tp_group", None) is not None:
        return False
    if any(count == 1 for count in optimizer.partition_count):
        return False
    optimizer._update_hp_grad = _copied_first(optimizer)
    optimizer.clear_hp_grads = _marked_stale(optimizer, optimizer.clear_hp_grads)
    optimizer.get_grads_for_reduction = _without_stale(optimizer, optimizer.get_grads_for_reduction)
    optimizer.get_grads_for_norm = _own_share_to_clip(optimizer, optimizer.get_grads_for_norm)
    return True


def _copied_first(optimizer: Any) -> Callable[..., None]:
    @torch.no_grad()
    def update(weight: Tensor, group: int, number: int, clear_lp_grads: bool) -> None:
        if weight.grad is None:
            return
        held = optimizer.fp32_groups_gradients[group][number]
        fresh = weight.grad.view(held.shape)
        held.add_(fresh) if optimizer.fp32_groups_has_gradients[group][number] else held.copy_(fresh)
        weight._hp_grad = held  # type: ignore[attr-defined]
        optimizer.fp32_groups_has_gradients[group][number] = True
        if clear_lp_grads:
            weight.grad.zero_()

    return update


def _marked_stale(optimizer: Any, clear: Callable[[], None]) -> Callable[[], None]:
    """What is left of an update is overwritten by the next one. Infinities are not left to lie about."""

    def mark() -> None:
        if optimizer.overflow:
            clear()
            return
        for group in optimizer.fp32_groups_has_gradients:
            group[:] = [False] * len(group)

    return mark


def _without_stale(optimizer: Any, grads: Callable[[], Any]) -> Callable[[], Any]:
    """Before the sum over ranks: a weight that had no gradient has zeros."""

    def fetch() -> Any:
        for held, known in zip(optimizer.fp32_groups_gradients, optimizer.fp32_groups_has_gradients, strict=True):
            for grad, has_gradient in zip(held, known, strict=True):
                if not has_gradient:
                    grad.zero_()
        return grads()

    return fetch


def _own_share_to_clip(optimizer: Any, grads: Callable[..., Any]) -> Callable[..., Any]:
    """The norm is of all gradients; after it only those of this rank's masters are looked at."""

    def fetch(for_clipping: bool = False) -> Any:
        return optimizer.fp32_groups_gradient_flat_partition if for_clipping else grads()

    return fetch
