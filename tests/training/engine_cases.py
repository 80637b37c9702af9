"""A small model, batches and a reference loop that every engine must agree with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from mlm_cli.parallel.context import ParallelContext
from mlm_cli.training.engine import OptimizerSettings
from mlm_cli.training.engine_choice import build_engine

SETTINGS = OptimizerSettings(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, clip_grad=0.5)
# What scales with the initial weights does so at any size of the gradient: no clipping here.
SCALED = replace(SETTINGS, lr_scaling="initial_std", clip_grad=0.0)
INITIAL_STD = {"0.weight": 0.5, "3.weight": (0.3, 0.01)}  # as `new_parameter` notes it; the narrowest counts
RATES = [1e-2, 2e-2, 3e-2, 2e-2, 1e-2]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.LayerNorm(20), nn.Linear(20, 5, bias=False))
    for name, std in INITIAL_STD.items():
        model.get_parameter(name).init = std  # type: ignore[attr-defined]
    return model


def make_batches(step: int, number: int, *, first: int = 0) -> list[dict[str, torch.Tensor]]:
    """Micro-batches ``first .. first + number`` of a step, 4 samples each."""
    batches = []
    for index in range(first, first + number):
        generator = torch.Generator().manual_seed(1000 * step + index)
        batches.append({"x": torch.randn(4, 6, generator=generator), "y": 3 * torch.randn(4, 5, generator=generator)})
    return batches


def objective(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
    out = model(batch["x"].to(model[0].weight.dtype))
    return (out.float() - batch["y"]).square().mean(), {"tokens": len(batch["x"])}


def reference_run(number: int) -> tuple[list[float], list[float], nn.Module]:
    """Losses, gradient norms and model after ``RATES`` by torch's own AdamW and clipping, float32."""
    model = make_model()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": SETTINGS.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=SETTINGS.betas, eps=SETTINGS.eps)
    losses, norms = [], []
    for step, lr in enumerate(RATES, start=1):
        total = torch.stack([objective(model, batch)[0] for batch in make_batches(step, number)]).mean()
        optimizer.zero_grad()
        total.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.clip_grad)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        losses.append(float(total.detach()))
    return losses, norms, model


def scaled_reference_run(number: int) -> nn.Module:
    """The model after ``RATES`` by torch's AdamW on weights of a deviation of 0.02, that the model multiplies."""
    model = make_model().double()
    scales = {"0.weight": 0.5 / 0.02, "3.weight": 0.01 / 0.02}
    drawn = {name: nn.Parameter(p.detach() / scales.get(name, 1.0)) for name, p in model.named_parameters()}
    decayed = [p for p in drawn.values() if p.dim() > 1]
    others = [p for p in drawn.values() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": SCALED.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=SCALED.betas, eps=SCALED.eps)
    for step, lr in enumerate(RATES, start=1):
        weights = {name: p * scales.get(name, 1.0) for name, p in drawn.items()}
        losses = []
        for batch in make_batches(step, number):
            out = functional_call(model, weights, (batch["x"].double(),))
            losses.append((out - batch["y"]).square().mean())
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(drawn[name] * scales.get(name, 1.0))
    return model


def engine_run(
    kind: Any,
    number: int,
    dtype: torch.dtype,
    parallel: ParallelContext | None = None,
    zero: int = 1,
    settings: OptimizerSettings = SETTINGS,
) -> tuple[list[float], list[float], dict[str, Any]]:
    """The same steps through an engine; each data rank takes its share of the ``number`` micro-batches of a step."""
    parallel = parallel or ParallelContext.single()
    share = number // parallel.data.size
    engine = build_engine(
        kind, make_model(), parallel, settings, dtype=dtype, accumulation=share, micro_batch_size=4, zero=zero
    )
    losses, norms = [], []
    for step, lr in enumerate(RATES, start=1):
        batches = make_batches(step, share, first=parallel.data.rank * share)
        outcomes = engine.accumulate(objective, batches)
        mean = torch.stack([outcome.loss for outcome in outcomes]).mean()
        losses.append(float(parallel.data.all_reduce_(mean)) / parallel.data.size)
        norms.append(engine.step(lr))
    with engine.fp32_weights():
        weights = {name: p.detach().clone().numpy() for name, p in engine.model.named_parameters()}
    return losses, norms, weights
