"""AdamW as a torch optimizer around the one-pass operator, for frameworks that want to own the loop over parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from mlm_cli import ops
from mlm_cli.training.engine import OptimizerSettings, ParameterSettings


def parameter_groups(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> list[dict[str, Any]]:
    """A group for all parameters with the same settings: those with weight decay first, then biases and norms."""
    groups: dict[ParameterSettings, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            groups.setdefault(settings.of(parameter), []).append(parameter)
    ordered = sorted(groups.items(), key=lambda item: item[0].weight_decay == 0.0)
    return [{"params": members, **asdict(own)} for own, members in ordered]


class AdamW(torch.optim.Optimizer):
    """``torch.optim.AdamW`` through ``ops.adamw_``.

    The step count is set from outside (``updates``), because ZeRO steps the parameter groups one by one, and a resumed
    run goes on counting.
    """

    def __init__(self, groups: list[dict[str, Any]], settings: OptimizerSettings) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": settings.betas, "eps": settings.eps})
        self.updates = 0

    def make_state(self) -> None:
        """Create the moments now, so that they can be filled from a checkpoint before the first step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.moments(parameter)

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """Both moments of one parameter, made when first asked for."""
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.moments(parameter)
                ops.adamw_(
                    parameter.data,
                    parameter.grad,
                    state["exp_avg"].detach(),
                    state["exp_avg_sq"].detach(),
                    None,
                    lr=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    step=self.updates,
                )
