"""The engine for several stages: DeepSpeed's pipeline (one forward, one backward: Narayanan et al. 2019) with ZeRO-1.

A stage is a part of the one list of layers (``models.gpt``). Only activations travel: each stage reads the same
micro-batches, and works out positions and masks itself. DeepSpeed's grid has the axes pipe, data, model with the last
one fastest, as ``ParallelContext`` numbers the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlm_cli.checkpoint.state import Fragment
from mlm_cli.models.model import Model
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.shard import shard_of
from mlm_cli.training.engine import Batch, Objective, OptimizerSettings, Outcome
from mlm_cli.training.engine_deepspeed import DeepSpeedEngine, initialize_deepspeed


class PipelineEngine(DeepSpeedEngine):
    """See ``training.engine.Engine``; ``model`` is this rank's stage."""

    name = "pipeline"

    def __init__(
        self,
        model: Model,
        parallel: ParallelContext,
        settings: OptimizerSettings,
        *,
        dtype: torch.dtype = torch.float32,
        accumulation: int = 1,
        micro_batch_size: int = 1,
        config_file: Path | None = None,
    ) -> None:
        self._stage_model = model
        super().__init__(
            model,
            parallel,
            settings,
            dtype=dtype,
            accumulation=accumulation,
            micro_batch_size=micro_batch_size,
            config_file=config_file,
        )
        if dtype != torch.bfloat16:  # whose optimizer takes one norm by itself
            self._zero.scaled_global_norm = partial(_norm_of_all_groups, self._zero)
        self.model = _Stages(model, self._pipe)  # type: ignore[assignment]

    def _make_deepspeed(self, config: dict[str, Any]) -> Any:
        """Called while the optimizer is built: wraps the stage as DeepSpeed wants it."""
        from deepspeed.runtime.pipe.schedule import OptimizerStep

        for _, parameter in self._named:
            # Norms count what is "model parallel" on every rank of a stage, and nothing else beyond the first stage.
            counts = shard_of(parameter) is not None or self.parallel.tensor.rank == 0
            parameter.tensor_model_parallel = parameter.model_parallel = counts  # type: ignore[attr-defined]
        engine = initialize_deepspeed(self._make_pipe, self._optimizer, config, self.parallel, mpu=None)
        # The update is taken by `step`, after all ranks have agreed that the losses are finite.
        engine._INSTRUCTION_MAP = MappingProxyType({**engine._INSTRUCTION_MAP, OptimizerStep: _later})
        return engine

    def _make_pipe(self) -> Any:
        self._pipe = make_pipe_module(self._stage_model, self.parallel)
        return self._pipe

    def accumulate(self, objective: Objective, batches: Sequence[Batch]) -> list[Outcome]:
        if len(batches) != self._deepspeed.gradient_accumulation_steps():  # batches grow
            self._deepspeed.set_train_batch_size(self._micro_batch_size * len(batches) * self.parallel.replicas.size)
        self._scale_own_losses(len(batches))
        self._pipe.begin(objective, batches)
        self._deepspeed.train_batch(iter([(batch["tokens"], batch["labels"]) for batch in batches]))
        found = torch.zeros(len(batches), 2, dtype=torch.float64, device=self.parallel.device)
        for row, outcome in zip(found, self._pipe.outcomes, strict=False):  # there are any on the last stage alone
            row[0], row[1] = outcome.loss.double(), float(outcome.sums.get("tokens", 0))
        self.parallel.pipeline.broadcast_(found, source=self.parallel.pipeline.size - 1)
        return [Outcome(row[0].float(), {"tokens": row[1]}) for row in found]

    def _take_step(self) -> None:
        self._deepspeed._exec_optimizer_step()

    def fragments(self) -> list[Fragment]:
        copies = self._stage_model.copies
        found = super().fragments()
        return [Fragment(f.name, f.shape, f.shard, f.start, f.tensors, copy=f.name in copies) for f in found]


def _norm_of_all_groups(zero: Any, norm_type: int = 2) -> Tensor:
    """The gradient norm with one reduction for all parameter groups.

    DeepSpeed reduces once a group, and stages may have different numbers of them (``lr_scaling``): they would wait for
    each other forever.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import combine_grad_norm_groups

    gradients, parameters = [], []
    for number in range(len(zero.bit16_groups)):
        kept = [grad for grad in zero.averaged_gradients[number] if not getattr(grad, "_zero_padding", False)]
        for gradient, parameter in zip(kept, zero.params_in_partition[number], strict=False):  # as DeepSpeed pairs them
            gradients.append(gradient)
            parameters.append(parameter)
    return combine_grad_norm_groups([zero.get_grad_norm_direct(gradients, parameters)], norm_type=norm_type)


def _later(engine: Any, **kwargs: Any) -> None:
    """In place of an instruction of the schedule that is carried out elsewhere."""


class _Stages:
    """The whole model outside of training: a batch goes through all stages, one after the other.

    Attributes:
        received: with gradients, what came from the stage before. Ask for its gradient: that sends it back.
    """

    def __init__(self, stage: Model, pipe: Any) -> None:
        self._stage, self._pipe = stage, pipe
        self.received: list[Tensor] = []

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        """As ``Model.scores``, equal on all stages."""
        stage, pipeline = self._stage, self._stage.parallel.pipeline
        x = batch["tokens"]
        if pipeline.rank > 0:
            x = torch.empty(stage.boundary(batch), dtype=stage.dtype, device=x.device)
            dist.recv(x, pipeline.ranks[pipeline.rank - 1], group=pipeline.handle)
        x = stage.run(x, stage.info(batch))
        found = torch.zeros(len(stage.score_names), 2, dtype=torch.float64, device=x.device)
        if stage.has_head:
            found = stage.scores_of(x, batch)
        else:
            dist.send(x.contiguous(), pipeline.ranks[pipeline.rank + 1], group=pipeline.handle)
        return pipeline.broadcast_(found, source=pipeline.size - 1)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As ``Model.loss``, equal on all stages; with gradients enabled the last stage's, and 0 on the others."""
        if torch.is_grad_enabled():
            return self._traced_loss(batch)
        summed, count = self.scores(batch)[0]
        return (summed / count.clamp(min=1.0)).float(), count.float()

    def _traced_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """A loss on every stage whose backward pass goes through all of them."""
        stage, pipeline = self._stage, self._stage.parallel.pipeline
        x, self.received = batch["tokens"], []
        if pipeline.rank > 0:
            before = pipeline.ranks[pipeline.rank - 1]
            x = torch.empty(stage.boundary(batch), dtype=stage.dtype, device=x.device)
            dist.recv(x, before, group=pipeline.handle)
            x.requires_grad_()
            x.register_hook(lambda grad: dist.send(grad.contiguous(), before, group=pipeline.handle))
            self.received = [x]
        x = stage.run(x, stage.info(batch))
        if stage.has_head:
            return stage.loss_of(x, batch)
        zero = _ToNextStage.apply(x, pipeline.ranks[pipeline.rank + 1], pipeline.handle)
        return zero, torch.zeros_like(zero)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)


class _ToNextStage(torch.autograd.Function):
    """Send activations on; returns 0. Its gradient is what the next stage sends back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, after: int, group: Any) -> Tensor:
        ctx.shape, ctx.dtype, ctx.after, ctx.group = x.shape, x.dtype, after, group
        dist.send(x.detach().contiguous(), after, group=group)
        return x.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        received = torch.empty(ctx.shape, dtype=ctx.dtype, device=grad.device)
        dist.recv(received, ctx.after, group=ctx.group)
        return received, None, None


def make_pipe_module(stage: Model, parallel: ParallelContext) -> Any:
    """DeepSpeed's ``PipelineModule`` around a stage that is built already."""
    from deepspeed.runtime.pipe.module import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    class StageModule(PipelineModule):
        """Layers are shared out, built and run by us; DeepSpeed's part is schedule, communication and tied weights."""

        def _partition_layers(self, method: str = "uniform") -> None:
            self.parts = list(range(parallel.pipeline.size + 1))
            self._set_bounds(start=parallel.pipeline.rank, stop=parallel.pipeline.rank + 1)

        def _build(self) -> None:
            self.stage = stage
            for parameter in stage.parameters():
                parameter.ds_pipe_replicated = False  # type: ignore[attr-defined]

        def _index_tied_modules(self) -> dict[str, Any]:
            found = {}
            for name, (group, ranks) in _sharing_groups(stage, parallel).items():
                module, key = stage.shared[name], name.replace(".", "_")
                self.tied_modules[key] = module
                if f"{name}.weight" in stage.copies:  # counts once in norms
                    module.weight.ds_pipe_replicated = True
                found[key] = {"ranks": ranks, "group": group, "weight_attr": ["weight"], "module": module}
            return found

        def _synchronize_tied_weights(self) -> None:
            with torch.no_grad():
                super()._synchronize_tied_weights()

        def begin(self, objective: Objective, batches: Sequence[Batch]) -> None:
            """The micro-batches of one update; forwards then come in their order."""
            self.objective, self.coming, self.outcomes = objective, iter(batches), []

        def forward(self, x: Tensor) -> Tensor:
            batch = next(self.coming)
            x = stage.run(x, stage.info(batch))
            if not stage.has_head:
                return x
            loss, sums = self.objective(_Last(stage, x), batch)
            self.outcomes.append(Outcome(loss.detach().float(), sums))
            return loss

    topology = PipeModelDataParallelTopology(
        num_pp=parallel.pipeline.size, num_mp=parallel.tensor.size, num_dp=parallel.replicas.size
    )
    layers = [nn.Identity() for _ in range(parallel.pipeline.size)]
    return StageModule(layers, topology=topology, seed_layers=False)


class _Last:
    """What the objective sees on the last stage: a model whose activations are there already."""

    def __init__(self, stage: Model, hidden: Tensor) -> None:
        self._stage, self._hidden = stage, hidden

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self._stage.loss_of(self._hidden, batch)

    def count_tokens(self, batch: Batch) -> Tensor:
        return self._stage.count_tokens(batch)


def _sharing_groups(stage: Model, parallel: ParallelContext) -> dict[str, tuple[Any, list[int]]]:
    """For each module that this stage shares with others: the group of its holders, and their ranks. All ranks call."""
    held: list[Any] = [None] * parallel.world.size
    dist.all_gather_object(held, (parallel.pipeline.ranks, sorted(stage.shared)))
    names = sorted({name for _, shared in held for name in shared})
    mine: dict[str, tuple[Any, list[int]]] = {}
    for line in sorted({ranks for ranks, _ in held}):
        for name in names:  # everywhere in this order, in which gradients are summed too
            holders = [rank for rank in line if name in held[rank][1]]
            if len(holders) < 2:
                continue
            handle = dist.new_group(holders)
            if parallel.world.rank in holders:
                mine[name] = (handle, holders)
    return mine
