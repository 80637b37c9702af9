"""ZeRO stage 3 (Rajbhandari et al. 2020, section 5.3): between uses every weight is cut over the data ranks too.

DeepSpeed gathers a module's own parameters around its ``forward`` (``runtime/zero/parameter_offload.py``). What
is used elsewhere must be announced: a layer's norms and products are called by name, the tied output weight is read by
the loss. Everything here leans on ``DeepSpeedZeroOptimizer_Stage3``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mlm_cli.checkpoint.state import KINDS, Fragment
from mlm_cli.parallel.shard import shard_of
from mlm_cli.training.adamw import AdamW
from mlm_cli.training.disk_state import DiskState


def announce_uses(runner: nn.Module, model: nn.Module) -> None:
    """Before DeepSpeed takes over: which modules use parameters that are not their own.

    A module that calls its children's methods says so by ``gathers_children = True``; one with parameters read from
    outside of any ``forward`` names them in ``read_outside() -> list of parameters``.
    """
    from deepspeed.runtime.zero.partition_parameters import register_external_parameter

    for module in model.modules():
        if getattr(module, "gathers_children", False):
            for parameter in module.parameters():
                register_external_parameter(module, parameter)
        if hasattr(module, "read_outside"):
            for parameter in module.read_outside():
                register_external_parameter(runner, parameter)


class Gathering:
    """The model for evaluation: every use goes through the module whose hooks gather the weights."""

    def __init__(self, runner: nn.Module, model: nn.Module) -> None:
        self._runner, self._model = runner, model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._runner(lambda model, _: model(*args, **kwargs), {})

    def loss(self, batch: dict[str, Tensor]) -> Any:
        return self._runner(lambda model, _: model.loss(batch), {})

    def scores(self, batch: dict[str, Tensor]) -> Any:
        return self._runner(lambda model, _: model.scores(batch), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def make_state(zero: Any, optimizer: AdamW, disk: DiskState | None = None) -> None:
    """Create the moments of this rank's partitions, so that they can be filled from a checkpoint.

    Args:
        disk: where they are to lie, and the masters of an offloaded optimizer with them.
    """
    for partition in zero.fp32_partitioned_groups_flat:
        if disk is not None:
            partition.data = disk.copy_of(partition.data)
            optimizer.state[partition] = {kind: disk.zeros(partition.numel()) for kind in KINDS if kind != "master"}
        optimizer.moments(partition)


def fragment(zero: Any, name: str, parameter: Any) -> Fragment:
    """This rank's part of one parameter's state: an even share of the flattened slice, the last ones padded."""
    share = parameter.partition_numel()
    start = min(zero._get_param_partition_rank(parameter) * share, parameter.ds_numel)
    numel = min(share, parameter.ds_numel - start)
    keys = dict(zip(KINDS, (None, "exp_avg", "exp_avg_sq"), strict=True))
    tensors = {
        kind: zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=key)[0]
        for kind, key in keys.items()
    }
    shape = tuple(parameter.ds_shape)
    return Fragment(name, shape, shard_of(parameter), start, {k: t.detach()[:numel] for k, t in tensors.items()})


@torch.no_grad()
def refresh(zero: Any) -> None:
    """Bring the partitioned weights, and those that are kept whole, in line with the masters."""
    for number in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(number)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
