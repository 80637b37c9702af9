"""The engine on DeepSpeed: ZeRO 1, 2 and 3 over the data ranks, tensor slicing through our ``mpu``.

Float32 runs on ``DeepSpeedZeroOptimizer``, bfloat16 with float32 gradients on ``BF16_Optimizer`` at stage 1. Both link
each parameter to the fragment of master weight and moments that this rank owns (``param._hp_mapping``,
``deepspeed/utils/tensor_fragment.py``): through these links checkpoints are read and written without DeepSpeed's own.
What is different at stage 3, where weights are cut too, is in ``zero3``.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlm_cli import distributed, log
from mlm_cli.checkpoint.folder import write_atomic
from mlm_cli.checkpoint.state import KINDS, Fragment
from mlm_cli.models.extra_loss import scale_losses
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.mpu import Mpu
from mlm_cli.parallel.shard import shard_of
from mlm_cli.training import bf16_passes, shared_collectives, zero3
from mlm_cli.training.adamw import AdamW, parameter_groups
from mlm_cli.training.disk_state import DiskState
from mlm_cli.training.ds_config import make_ds_config
from mlm_cli.training.engine import Batch, Objective, OptimizerSettings, Outcome
from mlm_cli.training.loss_scale import DeepSpeedScale


class _Runner(nn.Module):
    """What DeepSpeed wraps: its forward is the objective, so that its hooks see the loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, objective: Objective, batch: Batch) -> Any:
        return objective(self.model, batch)


class DeepSpeedEngine:
    """See ``training.engine.Engine``; the model is taken over and its weights become ``dtype``."""

    name = "deepspeed"

    def __init__(
        self,
        model: nn.Module,
        parallel: ParallelContext,
        settings: OptimizerSettings,
        *,
        dtype: torch.dtype = torch.float32,
        accumulation: int = 1,
        micro_batch_size: int = 1,
        zero: int = 1,
        offload: bool = False,
        state_folder: Path | None = None,
        config_file: Path | None = None,
    ) -> None:
        choose_accelerator(parallel)
        self.model, self.parallel, self._micro_batch_size = model, parallel, micro_batch_size
        self._module = model
        self._updates, self._stage, self._offload, self.overflowed = 0, zero, offload, False
        self._named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        for _, parameter in self._named:
            # The name DeepSpeed's norm looks for; parameters without it count once over the tensor group.
            parameter.tensor_model_parallel = shard_of(parameter) is not None  # type: ignore[attr-defined]
        config = make_ds_config(
            micro_batch_size=micro_batch_size,
            accumulation=accumulation,
            data_size=parallel.replicas.size,
            zero=zero,
            dtype=dtype,
            clip_grad=settings.clip_grad,
            loss_scale_window=settings.loss_scale_window,
            # A pipeline reduces after the last micro-batch: there is no backward pass left to run beside.
            overlap=parallel.device.type == "cuda" and parallel.pipeline.size == 1,
            offload=offload,
            pin_memory=parallel.device.type == "cuda",
            num_parameters=sum(parameter.numel() for _, parameter in self._named),
        )
        if config_file is not None and parallel.world.rank == 0:
            write_atomic(config_file, json.dumps(config, indent=2) + "\n")
        masters = [parameter.detach().clone() for _, parameter in self._named] if dtype != torch.float32 else []
        self._optimizer = AdamW(parameter_groups((p for _, p in self._named), settings), settings)
        # The order in which DeepSpeed lays the parameters of each group out.
        self._groups: list[list[Tensor]] = [list(group["params"]) for group in self._optimizer.param_groups]
        with _quiet_deepspeed():
            self._deepspeed = self._make_deepspeed(config)
            self._zero = self._deepspeed.optimizer
            half = dtype == torch.float16
            self.scaler = DeepSpeedScale(self._zero.loss_scaler, settings.loss_scale) if half else None
            if zero == 3:
                disk = DiskState(state_folder) if offload and state_folder is not None else None
                zero3.make_state(self._zero, self._optimizer, disk)
            else:
                self._optimizer.make_state()
                self._zero._lazy_init_hp_params_optimizer_state()
        self._start_from(masters)

    def _make_deepspeed(self, config: dict[str, Any]) -> Any:
        runner = _Runner(self.model)
        if self._stage == 3:
            zero3.announce_uses(runner, self.model)
            self.model = zero3.Gathering(runner, self.model)  # type: ignore[assignment]
        parallel = self.parallel
        if parallel.replicas.handle is None:
            distributed.join_alone(parallel.device)  # DeepSpeed wants a group all the same
            parallel = ParallelContext.create(device=parallel.device)
        engine = initialize_deepspeed(lambda: runner, self._optimizer, config, parallel, mpu=Mpu(parallel))
        shared_collectives.install(parallel.replicas, engine)
        bf16_passes.install(engine.optimizer)
        return engine

    @property
    def updates(self) -> int:
        return self._updates

    @updates.setter
    def updates(self, value: int) -> None:
        self._updates = value

    def accumulate(self, objective: Objective, batches: Sequence[Batch]) -> list[Outcome]:
        outcomes = []
        if len(batches) != self._deepspeed.gradient_accumulation_steps():  # batches grow
            self._deepspeed.set_train_batch_size(self._micro_batch_size * len(batches) * self.parallel.replicas.size)
        self._scale_own_losses(len(batches))
        for number, batch in enumerate(batches, start=1):
            loss, sums = self._deepspeed(objective, batch)
            self._deepspeed.backward(loss)  # divides by the number of micro-batches; averages over ranks at the last
            if number < len(batches):
                self._deepspeed.step()  # only counts
            outcomes.append(Outcome(loss.detach().float(), sums))
        return outcomes

    def _scale_own_losses(self, num_micro_batches: int) -> None:
        """The losses that layers have of their own begin as that of the model does: averaged, and scaled in float16."""
        scale_losses(self._module, (self.scaler.scale if self.scaler is not None else 1.0) / num_micro_batches)

    def step(self, lr: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self._optimizer.updates = self._updates + 1
        hopeless = self.scaler is not None and self.scaler.hopeless
        self._take_step()
        applied = self._deepspeed.was_step_applied()
        self.overflowed = self.scaler is not None and not applied and not hopeless
        if not applied:
            return math.inf
        self._updates += 1
        return float(self._zero._global_grad_norm)

    def _take_step(self) -> None:
        self._deepspeed.step()

    def discard(self) -> None:
        """Spoil the gradients, so that DeepSpeed itself passes over the update and keeps its own counts right."""
        held = getattr(self._zero, "fp32_groups_gradients_flat", None)  # BF16_Optimizer
        if held is None:
            held = [grad for grads in self._zero.averaged_gradients.values() for grad in grads or ()]
        for grad in held:
            grad.fill_(math.inf)
        if self._offload:  # gradients are on the host, and their norms were taken on the way
            for name, norm in self._zero.norm_for_param_grads.items():
                self._zero.norm_for_param_grads[name] = torch.full_like(torch.as_tensor(norm), math.inf)
        before = self.scaler.state() if self.scaler is not None else None
        assert not math.isfinite(self.step(0.0)), "DeepSpeed applied an update that was to be discarded"
        if self.scaler is not None and before is not None:
            self.scaler.load(before)
            self.overflowed = False

    def fragments(self) -> list[Fragment]:
        if self._stage == 3:
            return [zero3.fragment(self._zero, name, parameter) for name, parameter in self._named]
        found = []
        for name, parameter in self._named:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            empty = torch.empty(0, device=self.parallel.device)
            tensors = dict.fromkeys(KINDS, empty)
            if mapping is not None:
                tensors = {
                    "master": mapping.hp_fragment.detach(),
                    "exp_avg": mapping.get_optim_state_fragment("exp_avg").detach(),
                    "exp_avg_sq": mapping.get_optim_state_fragment("exp_avg_sq").detach(),
                }
            start = 0 if mapping is None else mapping.lp_fragment_address.start
            found.append(Fragment(name, tuple(parameter.shape), shard_of(parameter), start, tensors))
        return found

    def refresh(self) -> None:
        if self._stage == 3:
            zero3.refresh(self._zero)
        else:
            self._zero.update_lp_params()

    @contextmanager
    def fp32_weights(self) -> Iterator[None]:
        full = self._gather_masters()
        computed = [parameter.data for _, parameter in self._named]
        for _, parameter in self._named:
            parameter.data = full[id(parameter)]
        try:
            yield
        finally:
            for (_, parameter), weights in zip(self._named, computed, strict=True):
                parameter.data = weights

    def _gather_masters(self) -> dict[int, Tensor]:
        """The float32 masters, by ``id`` of the parameter, from the partitions of all data ranks."""
        if self._stage == 3:
            return {id(parameter): self._zero.get_full_hp_param(parameter) for _, parameter in self._named}
        full: dict[int, Tensor] = {}
        for group, members in zip(self._optimizer.param_groups, self._groups, strict=True):
            flat = torch.cat(self.parallel.replicas.all_gather(group["params"][0].detach()))
            offset = 0
            for parameter in members:
                full[id(parameter)] = flat[offset : offset + parameter.numel()].view(parameter.shape)
                offset += parameter.numel()
        return full

    @torch.no_grad()
    def _start_from(self, masters: list[Tensor]) -> None:
        """DeepSpeed makes float32 masters from the rounded weights; put back the bits that rounding took."""
        if not masters:
            return
        for fragment, master in zip(self.fragments(), masters, strict=True):
            fragment.tensors["master"].copy_(master.view(-1)[fragment.start : fragment.start + fragment.numel])
        self.refresh()


def choose_accelerator(parallel: ParallelContext) -> None:
    """Before anything imports DeepSpeed, which else takes a GPU that it sees though training is to be on the CPU."""
    if parallel.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"


def initialize_deepspeed(
    make_module: Callable[[], nn.Module], optimizer: AdamW, config: dict[str, Any], parallel: ParallelContext, mpu: Any
) -> Any:
    """``deepspeed.initialize`` without its launcher, its op builders and its scheduler."""
    os.environ.setdefault("LOCAL_RANK", str(parallel.device.index or 0))
    import deepspeed

    if parallel.device.type == "cpu" and config["fp16"]["enabled"]:
        # Asked whether it can compute in float16 it looks at oneDNN alone; torch's kernels and ours can.
        deepspeed.get_accelerator().is_fp16_supported = lambda: True
    # It calls functions of torch.distributed that newer torch has renamed; not for users to read every run.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    # An empty answer to "which C++ operators can be built here": nothing is probed or compiled at start-up.
    deepspeed.ops.__dict__.setdefault("__compatible_ops__", {})
    _import_without_compiling("deepspeed.runtime.zero.muon.original_muon")
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    engine, *_ = deepspeed.initialize(
        model=make_module(), optimizer=optimizer, config=config, mpu=mpu, dist_init_required=False
    )
    return engine


def _import_without_compiling(name: str) -> None:
    """Import a module that DeepSpeed will ask for, an optimizer of no use here, whose functions want ``torch.compile``.

    Marking them alone loads torch's compiler: half of the seconds that a start takes.
    """
    compile_, torch.compile = torch.compile, lambda function=None, **_: function or (lambda other: other)  # type: ignore[assignment]
    try:
        importlib.import_module(name)
    except ImportError:  # another version of DeepSpeed
        pass
    finally:
        torch.compile = compile_


@contextmanager
def _quiet_deepspeed() -> Iterator[None]:
    """Its prints and logs stay off stdout; with ``--verbose`` its log is told on stderr."""
    with contextlib.redirect_stdout(io.StringIO()):
        # The logger takes hold of stdout when DeepSpeed is imported, which may have been long ago.
        logger = logging.getLogger("DeepSpeed")
        _redirect(logger)
        yield
        _redirect(logger)  # created only now, if this was the first import


def _redirect(logger: logging.Logger) -> None:
    logger.handlers = [_Detail()]
    logger.propagate = False


class _Detail(logging.Handler):
    """Hands records on to our own log."""

    def emit(self, record: logging.LogRecord) -> None:
        log.detail(f"deepspeed: {record.getMessage()}")
