"""What every job that trains builds from its recipe, the same way."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from mlm_cli import distributed, log
from mlm_cli.checkpoint import agree
from mlm_cli.checkpoint.load import find_newest, load_state
from mlm_cli.checkpoint.save import Checkpointer
from mlm_cli.checkpoint.state import Position
from mlm_cli.config.schema import AttentionSection, ModelSection, Recipe
from mlm_cli.errors import RankLostError
from mlm_cli.models.attention import Attention
from mlm_cli.models.block import Block
from mlm_cli.models.contrast import Contrast, contrast_statistics
from mlm_cli.models.count import FLOPS_FORMULA
from mlm_cli.models.experts import routing_statistics
from mlm_cli.models.model import Model
from mlm_cli.ops import products
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.random import RandomStreams, key_of
from mlm_cli.training.allocator import keep_freed_memory
from mlm_cli.training.engine import Engine, OptimizerSettings
from mlm_cli.training.metrics import find_peak
from mlm_cli.training.monitor import Monitor
from mlm_cli.training.numerics import Numerics, Policy
from mlm_cli.training.schedule import Schedule
from mlm_cli.training.session import Session
from mlm_cli.training.watchdog import Watchdog, limit_waits, longest_wait

_SLOW_DISK = 100e6  # bytes a second, hashing included: what the time limit keeps free for the last save
# Settings of training and arithmetic that weights do not depend on: the recipe's, whatever the weights came with.
FREE_MODEL_KEYS = ("hidden_dropout", "attention_dropout", "attention", "init_std", "make_vocab_size_divisible_by")
# Of a mixture of experts: what its weights do not depend on.
FREE_EXPERT_KEYS = ("capacity_factor", "balance_loss")
# The length of the context: pretraining may go on at another one than the weights come from.
CONTEXT_KEYS = ("seq_length", "rotary_scaling")


@contextmanager
def joined(recipe: Recipe) -> Iterator[ParallelContext]:
    """This process as a rank of its job, whose ranks are laid out as the recipe says; it leaves the job at the end."""
    env = distributed.init(timeout_seconds=longest_wait(recipe.train.heartbeat))
    if env.device.type == "cpu":
        keep_freed_memory()
    try:
        section = recipe.parallel
        yield ParallelContext.create(
            tensor=section.tensor,
            pipeline=section.pipeline,
            context=section.context,
            sequence=section.sequence,
            device=env.device,
        )
    finally:
        distributed.shutdown()


def seed_everything(seed: int, parallel: ParallelContext) -> None:
    """Generators that nothing here should draw from, but a library might."""
    key = key_of(seed, "python", parallel.world.rank)
    random.seed(key)
    np.random.seed(key % 2**32)


def free_settings(model: ModelSection) -> dict[str, object]:
    """What a recipe may change about a model that is loaded."""
    return {key: getattr(model, key) for key in FREE_MODEL_KEYS}


def kept_pattern(asked: AttentionSection, found: AttentionSection) -> AttentionSection:
    """Attention of a model that is fine-tuned: its own pattern, unless the recipe names one; the recipe's kernel."""
    return asked if asked.pattern is not None else found.model_copy(update={"kernel": asked.kernel})


def prepare_for_training(model: Model, recipe: Recipe, parallel: ParallelContext, dtype: torch.dtype) -> RandomStreams:
    """Set how a float32 model is trained: type, recomputation, further losses, dropout, compiled layers.

    Returns the streams of its dropout.
    """
    model.dtype = dtype
    model.recompute = recipe.train.recompute == "full"
    for module in model.modules():
        if isinstance(module, Attention):
            module.recompute = recipe.train.recompute == "selective"
    if recipe.train.contrastive_margin and model.has_head:
        model.contrast = Contrast(recipe.train.contrastive_margin)
    streams = RandomStreams(parallel, recipe.seed)
    model.set_streams(streams)
    if recipe.train.compile:
        for layer in model.modules():
            if isinstance(layer, Block):
                layer.compile()
    return streams


def build_statistics(
    model: nn.Module, recipe: Recipe, parallel: ParallelContext
) -> Callable[[], dict[str, float]] | None:
    """What training tells beside the loss, asked by all ranks; None: nothing."""
    asked = [routing_statistics] if recipe.model.experts is not None else []
    asked += [contrast_statistics] if recipe.train.contrastive_margin else []
    return (lambda: {k: v for ask in asked for k, v in ask(model, parallel).items()}) if asked else None


def optimizer_settings(recipe: Recipe) -> OptimizerSettings:
    section = recipe.optimizer
    return OptimizerSettings(
        betas=section.betas,
        eps=section.eps,
        weight_decay=section.weight_decay,
        lr_scaling=section.lr_scaling,
        clip_grad=recipe.train.clip_grad,
        loss_scale=recipe.train.initial_loss_scale,
        loss_scale_window=recipe.train.loss_scale_window,
    )


def build_schedule(recipe: Recipe) -> Schedule:
    section = recipe.schedule
    return Schedule(
        lr=recipe.optimizer.lr,
        steps=recipe.train.steps,
        warmup_steps=section.warmup_steps,
        decay=section.decay,
        decay_steps=section.decay_steps,
        min_lr=section.min_lr,
    )


def policy_of(recipe: Recipe) -> Policy:
    section = recipe.train
    return Policy(section.on_bad_loss, section.spike_zscore, section.spike_window, section.max_bad_steps)


def build_numerics(
    session: Session,
    engine: Engine,
    streams: RandomStreams,
    parallel: ParallelContext,
    checkpointer: Checkpointer,
    position: Position,
) -> Numerics:
    """The policy for bad losses. A run that may have to go back saves its beginning too, also one in another's."""
    policy = policy_of(session.recipe)

    def rollback() -> Position:
        checkpointer.finish()
        found = find_newest(session.run)
        assert found is not None, "a run that rolls back has saved its first step"
        return load_state(found, engine, streams, parallel)

    saving = checkpointer.bytes_needed() / _SLOW_DISK  # a collective: also on ranks without a deadline
    if session.stop.deadline is not None:
        session.stop.deadline.saving = saving
    if policy.action == "rollback" and not agree.on_rank_zero(session.run.steps):
        checkpointer.save(position)
    return Numerics(policy, rollback)


def watch_ranks(recipe: Recipe, parallel: ParallelContext) -> Watchdog:
    """The heartbeat of this rank; enter it as soon as the ranks have met."""
    limit_waits(parallel, recipe.train.heartbeat)
    return Watchdog(parallel.world.rank, parallel.world.size, recipe.train.heartbeat)


def tell_of_hangs(watchdog: Watchdog, session: Session) -> None:
    """From now on ``status.json`` says so too when a rank hangs."""

    def on_hang(verdict: str) -> None:
        session.status.update("failed", exit_code=RankLostError.exit_code, message=verdict)

    watchdog.on_hang = on_hang


def build_monitor(
    session: Session,
    parallel: ParallelContext,
    dtype: torch.dtype,
    position: Position,
    *,
    flops_per_token: float | None,
) -> Monitor:
    """The records of a run. ``flops_per_token`` None: model FLOP/s and MFU are not known."""
    recipe = session.recipe
    if products.widens(torch.empty(0, dtype=dtype, device=parallel.device)):
        log.info(
            f"this processor has no instructions for products in {str(dtype).removeprefix('torch.')}: "
            "they are computed in float32, and train.precision=fp32 is as fast"
        )
    known = None
    if flops_per_token is not None:
        peak = find_peak(parallel.device, dtype)
        # A rank that does not know its rate makes the sum unknown.
        rate = torch.tensor([peak.flops or float("nan")], dtype=torch.float64, device=parallel.device)
        total = float(parallel.world.all_reduce_(rate))
        known = None if total != total else total
        shown = f"{known / 1e12:.2f} TFLOP/s, {peak.source}" if known else peak.source
        log.detail(f"MFU: model FLOP/s ({FLOPS_FORMULA}) / matrix rate of all ranks ({shown})")
    return Monitor(
        session.run,
        session.status,
        steps=recipe.train.steps,
        every=recipe.log.every,
        device=parallel.device,
        flops_per_token=flops_per_token,
        peak_flops=known,
        tensorboard=recipe.log.tensorboard,
        resumed_step=position.step,
        writes=parallel.world.rank == 0,
    )
