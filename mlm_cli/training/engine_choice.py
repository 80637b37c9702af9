"""Which engine a layout gets."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import nn

from mlm_cli.errors import UsageError
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.training.engine import Engine, OptimizerSettings

EngineKind = Literal["deepspeed", "pipeline", "plain"]


def choose_engine(
    wanted: Literal["auto", "deepspeed", "plain"], *, zero: int, parallel: ParallelContext, offload: bool = False
) -> EngineKind:
    """DeepSpeed where ZeRO has something to shard, else a plain optimizer step; an explicit wish is honoured.

    Several stages always run on DeepSpeed's pipeline, with ZeRO-1.

    Raises:
        UsageError: the wish and ``parallel.zero`` contradict each other.
    """
    if parallel.pipeline.size > 1:
        if wanted == "plain" or zero > 1:
            raise UsageError(
                f"parallel.pipeline={parallel.pipeline.size} excludes train.engine=plain and parallel.zero=2, 3",
                hint="set train.engine=auto and parallel.zero=1",
            )
        return "pipeline"
    if wanted == "deepspeed" and zero == 0:
        raise UsageError(
            "train.engine=deepspeed needs parallel.zero of 1, 2 or 3",
            hint="set parallel.zero=1, or train.engine=plain",
        )
    if wanted == "plain" and zero > 0 and parallel.replicas.size > 1:
        raise UsageError(
            f"train.engine=plain cannot shard (parallel.zero={zero}) over {parallel.replicas.size} copies of the model",
            hint="set parallel.zero=0, or train.engine=auto",
        )
    if wanted != "auto":
        return wanted
    return "deepspeed" if zero > 0 and (parallel.replicas.size > 1 or offload) else "plain"


def build_engine(
    kind: EngineKind,
    model: nn.Module,
    parallel: ParallelContext,
    settings: OptimizerSettings,
    *,
    dtype: torch.dtype,
    accumulation: int,
    micro_batch_size: int,
    zero: int = 1,
    offload: bool = False,
    state_folder: Path | None = None,
    config_file: Path | None = None,
) -> Engine:
    """Put a float32 model under an engine that computes in ``dtype``.

    Args:
        accumulation: most micro-batches of one update on this rank.
        zero: ZeRO stage of the DeepSpeed engine.
        offload: at stage 3 keep its state in the memory of the host.
        state_folder: of the offloaded state, keep masters and moments in files of this folder instead.
        config_file: where to leave a copy of what DeepSpeed was given.
    """
    if kind == "plain":
        from mlm_cli.training.engine_plain import PlainEngine

        return PlainEngine(model, parallel, settings, dtype=dtype, accumulation=accumulation)
    if kind == "pipeline":
        from mlm_cli.models.model import Model
        from mlm_cli.training.engine_pipeline import PipelineEngine

        assert isinstance(model, Model)
        return PipelineEngine(
            model,
            parallel,
            settings,
            dtype=dtype,
            accumulation=accumulation,
            micro_batch_size=micro_batch_size,
            config_file=config_file,
        )
    from mlm_cli.training.engine_deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(
        model,
        parallel,
        settings,
        dtype=dtype,
        accumulation=accumulation,
        micro_batch_size=micro_batch_size,
        zero=max(1, zero),
        offload=offload,
        state_folder=state_folder,
        config_file=config_file,
    )
