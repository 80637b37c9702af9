"""The engine without a framework: float32 masters and AdamW in one pass, gradients averaged over data ranks.

In float32 the parameters are their own masters. In half precision a gradient is used as autograd left it, unless
several micro-batches or data ranks are to be added up: that happens in a float32 buffer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlm_cli import ops
from mlm_cli.checkpoint.state import Fragment
from mlm_cli.models.extra_loss import scale_losses
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.shard import shard_of
from mlm_cli.training.engine import Batch, Objective, OptimizerSettings, Outcome, ParameterSettings
from mlm_cli.training.loss_scale import LossScale

_BUCKET = 1 << 24  # gradients reduced over data ranks at once, in elements
_PIECE = 1 << 18  # gradients squared at once, in elements: 1 MB, half of a core's cache


@dataclass
class _Slot:
    """A parameter and what belongs to it. ``filled``: the buffer holds gradients of this update."""

    name: str
    param: nn.Parameter
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    settings: ParameterSettings
    buffer: Tensor | None = None
    filled: bool = False

    @property
    def grad(self) -> Tensor | None:
        if self.buffer is None:
            return self.param.grad
        return self.buffer if self.filled else None


class PlainEngine:
    """See ``training.engine.Engine``; the model is taken over and its weights become ``dtype``."""

    name = "plain"

    def __init__(
        self,
        model: nn.Module,
        parallel: ParallelContext,
        settings: OptimizerSettings,
        *,
        dtype: torch.dtype = torch.float32,
        accumulation: int = 1,
    ) -> None:
        self.model, self.parallel, self.settings = model, parallel, settings
        self.updates, self._taken = 0, accumulation  # micro-batches of the update under way
        self.scaler = LossScale(settings.loss_scale, settings.loss_scale_window) if dtype == torch.float16 else None
        self.overflowed = False
        self._slots = [self._make_slot(name, p, dtype) for name, p in model.named_parameters() if p.requires_grad]
        self._flat: Tensor | None = None
        if parallel.replicas.size > 1 or (accumulation > 1 and dtype != torch.float32):
            self._make_buffers()
        # A parameter that every tensor rank holds in full counts once in the norm.
        self._counted = [shard_of(slot.param) is not None or parallel.tensor.rank == 0 for slot in self._slots]

    def accumulate(self, objective: Objective, batches: Sequence[Batch]) -> list[Outcome]:
        self._taken = len(batches)
        outcomes = []
        if self.scaler is not None:
            scale_losses(self.model, self.scaler.scale)
        for batch in batches:
            loss, sums = objective(self.model, batch)
            (loss if self.scaler is None else loss * self.scaler.scale).backward()
            outcomes.append(Outcome(loss.detach().float(), sums))
        return outcomes

    @torch.no_grad()
    def step(self, lr: float) -> float:
        scale = 1.0 / (self._taken * self.parallel.replicas.size * (self.scaler.scale if self.scaler else 1.0))
        if self.parallel.replicas.size > 1:
            self._reduce()
        norm = self._norm() * scale
        overflow = self.scaler is not None and not math.isfinite(norm)
        self.overflowed = self.scaler is not None and self.scaler.update(overflow) and overflow
        if math.isfinite(norm):
            clip = self.settings.clip_grad
            factor = min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0  # as torch.nn.utils.clip_grad_norm_
            self.updates += 1
            self._update(lr, scale * factor)
        self.discard()
        return norm

    def discard(self) -> None:
        for slot in self._slots:
            slot.param.grad = None
            slot.filled = False

    def _update(self, lr: float, grad_scale: float) -> None:
        beta1, beta2 = self.settings.betas
        for slot in self._slots:
            if (grad := slot.grad) is None:
                continue
            ops.adamw_(
                slot.master,
                grad,
                slot.exp_avg,
                slot.exp_avg_sq,
                None if slot.master.dtype == slot.param.dtype else slot.param.data,
                lr=lr * slot.settings.lr_scale,
                beta1=beta1,
                beta2=beta2,
                eps=slot.settings.eps,
                weight_decay=slot.settings.weight_decay,
                step=self.updates,
                grad_scale=grad_scale,
            )

    def _norm(self) -> float:
        """Global norm of the summed gradients, equal on all ranks. Waits for the device."""
        counted = [
            slot.grad
            for slot, counts in zip(self._slots, self._counted, strict=True)
            if counts and slot.grad is not None
        ]
        total = _sum_of_squares([grad for grad in counted if grad is not None], self.parallel.device)
        value = float(self.parallel.tensor.all_reduce_(total))
        return math.sqrt(value) if math.isfinite(value) else value

    def _reduce(self) -> None:
        """Sum the buffer over data ranks, in pieces."""
        assert self._flat is not None
        for slot in self._slots:
            if slot.buffer is not None and not slot.filled:
                slot.buffer.zero_()  # unused here, but perhaps used on another rank
                slot.filled = True
        for piece in self._flat.split(_BUCKET):
            self.parallel.replicas.all_reduce_(piece)

    def fragments(self) -> list[Fragment]:
        return [
            Fragment(
                slot.name,
                tuple(slot.param.shape),
                shard_of(slot.param),
                0,
                {
                    "master": slot.master.view(-1),
                    "exp_avg": slot.exp_avg.view(-1),
                    "exp_avg_sq": slot.exp_avg_sq.view(-1),
                },
            )
            for slot in self._slots
        ]

    @torch.no_grad()
    def refresh(self) -> None:
        for slot in self._slots:
            if slot.master.dtype != slot.param.dtype:
                slot.param.copy_(slot.master)

    @contextmanager
    def fp32_weights(self) -> Iterator[None]:
        computed = [slot.param.data for slot in self._slots]
        for slot in self._slots:
            slot.param.data = slot.master
        try:
            yield
        finally:
            for slot, weights in zip(self._slots, computed, strict=True):
                slot.param.data = weights

    def _make_slot(self, name: str, param: nn.Parameter, dtype: torch.dtype) -> _Slot:
        master = param.detach().float().contiguous()
        param.data = master if dtype == torch.float32 else master.to(dtype)
        return _Slot(name, param, master, torch.zeros_like(master), torch.zeros_like(master), self.settings.of(param))

    def _make_buffers(self) -> None:
        """One flat float32 buffer; each gradient is added to its part of it, and freed, as soon as autograd made it."""
        self._flat = torch.zeros(sum(slot.param.numel() for slot in self._slots), device=self.parallel.device)
        views = self._flat.split([slot.param.numel() for slot in self._slots])
        for slot, view in zip(self._slots, views, strict=True):
            slot.buffer = view.view(slot.param.shape)
            slot.param.register_post_accumulate_grad_hook(_collector(slot))


def _sum_of_squares(grads: list[Tensor], device: torch.device) -> Tensor:
    """Over all elements of all tensors: float64 scalar, from float32 products."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    large = []
    if device.type == "cpu":
        # torch's norm of bfloat16 takes four times as long on the CPU as widening a piece that stays in the cache.
        large = [grad for grad in grads if grad.dtype == torch.bfloat16 and grad.numel() > _PIECE]
        grads = [grad for grad in grads if grad.dtype != torch.bfloat16 or grad.numel() <= _PIECE]
    if grads:
        total += torch.stack(torch._foreach_norm(grads, 2.0, dtype=torch.float32)).double().square().sum()
    wide = torch.empty(_PIECE if large else 0)
    for grad in large:
        for piece in grad.view(-1).split(_PIECE):
            part = wide[: piece.numel()].copy_(piece)
            total += torch.dot(part, part)
    return total


def _collector(slot: _Slot):  # type: ignore[no-untyped-def]
    def collect(param: Tensor) -> None:
        assert slot.buffer is not None and param.grad is not None
        if slot.filled:
            slot.buffer.add_(param.grad)
        else:
            slot.buffer.copy_(param.grad)
            slot.filled = True
        param.grad = None

    return collect
