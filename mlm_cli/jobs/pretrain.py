"""The body of ``mlm pretrain``: everything swappable is built here, from the recipe, then the loop runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlm_cli import log
from mlm_cli.checkpoint import agree
from mlm_cli.checkpoint.hub import (
    check_vocabulary,
    load_model_folder,
    read_model_config,
    resolve_model,
    save_model_folder,
)
from mlm_cli.checkpoint.load import load_state
from mlm_cli.checkpoint.manifest import FileRecord, check_weights
from mlm_cli.checkpoint.save import Checkpointer, Identity
from mlm_cli.checkpoint.state import Position
from mlm_cli.config.derived import Batch, batch_arithmetic, global_batch_at
from mlm_cli.config.schema import ModelSection, Recipe
from mlm_cli.config.shapes import check_slices, is_sparse, sample_tokens, written_out
from mlm_cli.data.loader import batches
from mlm_cli.data.samples import SampleSource, open_training_data, with_sizes
from mlm_cli.data.tokenizer import Tokenizer, load_tokenizer
from mlm_cli.errors import UsageError
from mlm_cli.jobs.training_parts import (
    CONTEXT_KEYS,
    FREE_EXPERT_KEYS,
    FREE_MODEL_KEYS,
    build_monitor,
    build_numerics,
    build_schedule,
    build_statistics,
    free_settings,
    joined,
    optimizer_settings,
    prepare_for_training,
    seed_everything,
    tell_of_hangs,
    watch_ranks,
)
from mlm_cli.models.count import count_parameters, flops_per_token
from mlm_cli.models.model import Model
from mlm_cli.models.registry import build_model
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.random import RandomStreams
from mlm_cli.training.engine import Engine
from mlm_cli.training.engine_choice import build_engine, choose_engine
from mlm_cli.training.loop import Plan, train
from mlm_cli.training.precision import choose_dtype
from mlm_cli.training.session import Session, open_session
from mlm_cli.training.stop import Cause, StopFlag, exit_code, find_deadline
from mlm_cli.training.validation import Validator

Later = list[Callable[[], None]] | None  # what is left to write, for the background


def run(recipe: Recipe) -> int:
    """Pretrain, or go on pretraining, on every rank of the job.

    Returns:
        0 when the run has taken all its steps; 75 (or 130 after Ctrl-C) when it was stopped by a signal or by its time
        limit, with a checkpoint.

    Raises:
        MlmError: see DESIGN section 1 for the exit codes.
    """
    with StopFlag(find_deadline(recipe.train.time_limit)).listening() as stop:
        return _run_ranks(recipe, stop)


def _run_ranks(recipe: Recipe, stop: StopFlag) -> int:
    with joined(recipe) as parallel, watch_ranks(recipe, parallel) as watchdog:
        tokenizer = agree.all_succeed(lambda: load_tokenizer(recipe.tokenizer) if recipe.tokenizer else None)
        batch = batch_arithmetic(recipe, parallel.world.size)
        with open_session(fill_in(recipe, tokenizer, batch), stop) as session:
            tell_of_hangs(watchdog, session)
            return _run(session, tokenizer, batch, parallel)


def _run(session: Session, tokenizer: Tokenizer | None, batch: Batch, parallel: ParallelContext) -> int:
    """Data, engine, checkpoints, monitor; then the loop."""
    recipe = session.recipe
    if session.found is not None and session.complete:
        step = session.found.manifest.step
        log.info(f"{session.run} is complete: {step:,} steps taken; raise train.steps to go on")
        session.status.update("finished", step=step, exit_code=0)
        return 0

    # data comes first: what is wrong with it is said before anything is built
    data = agree.all_succeed(lambda: open_data(recipe, tokenizer))
    train_source, valid_source = data["train"], data["valid"]
    assert train_source is not None
    fingerprint = data_fingerprint(train_source, tokenizer)
    session.check_data(fingerprint)

    dtype = choose_dtype(recipe.train.precision, parallel.device)
    model, engine, streams = build_training_engine(
        recipe, batch, parallel, dtype, fresh=session.found is None, config_file=session.run.ds_config
    )
    position = Position(0, 0)
    if session.found is not None:
        position = load_state(session.found, engine, streams, parallel)
        log.info(f"resuming {session.run} from {session.found.folder.name}")

    checkpointer = Checkpointer(
        session.run,
        engine,
        parallel,
        write_model=_model_writer(model, tokenizer, recipe),
        streams=streams,
        identity=Identity(session.recipe_hash, fingerprint),
        keep_last=recipe.checkpoint.keep_last,
        keep_best=recipe.checkpoint.keep_best,
        background=recipe.checkpoint.background,
    )
    _check_space(checkpointer, recipe, position)
    supply = supply_batches(recipe, train_source, position, batch, parallel)
    per_token = flops_per_token(recipe.model, masked_share=recipe.data.masking.probability)
    monitor = build_monitor(session, parallel, dtype, position, flops_per_token=per_token)
    numerics = build_numerics(session, engine, streams, parallel, checkpointer, position)
    _say_plan(recipe, batch, parallel, engine.name, dtype)
    with closing(monitor), closing(supply):  # type: ignore[type-var]
        position, received = train(
            plan_of(recipe, batch),
            engine,
            supply,
            objective,
            build_schedule(recipe),
            start=position,
            parallel=parallel,
            evaluator=_build_validator(valid_source, session, batch, parallel),
            checkpointer=checkpointer,
            monitor=monitor,
            stop=session.stop,
            numerics=numerics,
            statistics=build_statistics(model, recipe, parallel),
        )
    return _finish(session, position, received)


def _finish(session: Session, position: Position, received: Cause | None) -> int:
    """Say how it ended; returns the exit code."""
    if received is not None:
        code = exit_code(received)
        session.status.update("stopped", step=position.step, exit_code=code, message=received.name)
        saved = ", checkpoint saved" if position.step else ""
        log.info(f"{received.name}: stopped after step {position.step:,}{saved}; the same command goes on")
        return code
    session.status.update("finished", step=position.step, exit_code=0)
    log.info(f"{session.run}: {position.step:,} steps done, {session.run.checkpoint(position.step).name} saved")
    return 0


def objective(model: Model, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
    """The family's own loss."""
    loss, _ = model.loss(batch)
    return loss, {"tokens": model.count_tokens(batch)}


def fill_in(recipe: Recipe, tokenizer: Tokenizer | None, batch: Batch) -> Recipe:
    """The recipe with the sizes that follow from tokenizer and ranks, so that its copy means the same anywhere."""
    model = with_sizes(recipe.model, recipe.data, tokenizer)
    if tokenizer is not None:
        check_vocabulary(model, tokenizer, where="model.vocab_size")
    check_slices(model, recipe.parallel.tensor)
    section = recipe.train.model_copy(update={"global_batch_size": batch.global_batch_size})
    return recipe.model_copy(update={"model": model, "train": section})


def build_training_engine(
    recipe: Recipe,
    batch: Batch,
    parallel: ParallelContext,
    dtype: torch.dtype,
    *,
    fresh: bool,
    config_file: Path | None = None,
) -> tuple[Model, Engine, RandomStreams]:
    """What trains a recipe's model. ``fresh``: with initial weights; else a checkpoint will fill them in."""
    seed_everything(recipe.seed, parallel)
    model, streams = _build_model(recipe, parallel, dtype, fresh=fresh)
    offload = recipe.parallel.offload != "none"
    engine = build_engine(
        choose_engine(recipe.train.engine, zero=recipe.parallel.zero, parallel=parallel, offload=offload),
        model,
        parallel,
        optimizer_settings(recipe),
        dtype=dtype,
        accumulation=batch.gradient_accumulation_steps,
        micro_batch_size=batch.micro_batch_size,
        zero=recipe.parallel.zero,
        offload=offload,
        state_folder=_state_folder(recipe),
        config_file=config_file,
    )
    return model, engine, streams


def _state_folder(recipe: Recipe) -> Path | None:
    """Where masters and moments lie under ``parallel.offload: nvme``."""
    if recipe.parallel.offload != "nvme":
        return None
    return Path(recipe.parallel.offload_folder or recipe.output)


def supply_batches(
    recipe: Recipe, source: SampleSource, position: Position, batch: Batch, parallel: ParallelContext
) -> Iterator[dict[str, Tensor]]:
    """Micro-batches of this data rank from ``position`` on; close it."""
    return batches(
        source,
        start_sample=position.consumed_samples,
        micro_batch_size=batch.micro_batch_size,
        data_rank=parallel.data.rank,
        data_size=parallel.data.size,
        num_workers=recipe.data.num_workers,
    )


def plan_of(recipe: Recipe, batch: Batch) -> Plan:
    """The steps to take, and what happens after which of them."""
    return Plan(
        steps=recipe.train.steps,
        accumulation=batch.gradient_accumulation_steps,
        global_batch_size=batch.global_batch_size,
        checkpoint_every=recipe.checkpoint.every,
        evaluate_every=recipe.evaluate.every,
        batch_at=lambda consumed: global_batch_at(consumed, batch.global_batch_size, recipe.train.rampup),
    )


def _check_space(checkpointer: Checkpointer, recipe: Recipe, position: Position) -> None:
    """Is there room for the checkpoints to come?"""
    remaining = recipe.train.steps - position.step
    checkpointer.check_space(1 + (remaining - 1) // recipe.checkpoint.every if recipe.checkpoint.every else 1)


def open_data(recipe: Recipe, tokenizer: Tokenizer | None) -> dict[str, SampleSource | None]:
    """Samples by what they are for: ``train``, ``valid`` (None: none were kept apart)."""
    return open_training_data(recipe.data, recipe.model, tokenizer, seed=recipe.seed)


def data_fingerprint(source: SampleSource, tokenizer: Tokenizer | None) -> str:
    """What a checkpoint remembers of its data: another order, text or tokenizer gives another one."""
    return sha256(f"{source.fingerprint} {tokenizer.fingerprint if tokenizer else None}".encode()).hexdigest()


def _build_model(
    recipe: Recipe, parallel: ParallelContext, dtype: torch.dtype, *, fresh: bool
) -> tuple[Model, RandomStreams]:
    """The model in float32: the engine keeps these bits as masters and rounds its own copy."""
    if fresh and recipe.init_from is not None:
        init_from = recipe.init_from
        agree.on_rank_zero(lambda: check_weights(resolve_model(init_from)))
        model = agree.all_succeed(lambda: _start_from(init_from, recipe, parallel))
    else:
        model = build_model(recipe.model, parallel, dtype=torch.float32, seed=recipe.seed, init=fresh)
    return model.train(), prepare_for_training(model, recipe, parallel, dtype)


def _start_from(init_from: str, recipe: Recipe, parallel: ParallelContext) -> Model:
    """The weights of another run, for the context and the attention that this recipe asks for."""
    folder = resolve_model(init_from)
    _check_same_shape(read_model_config(folder)[0], recipe, init_from)
    changes = free_settings(recipe.model) | {key: getattr(recipe.model, key) for key in (*CONTEXT_KEYS, "experts")}
    model, _ = load_model_folder(folder, parallel, changes=changes)
    return model


def _check_same_shape(section: ModelSection, recipe: Recipe, init_from: str) -> None:
    wanted, found = (written_out(model).model_dump() for model in (recipe.model, section))
    free = {*FREE_MODEL_KEYS, *CONTEXT_KEYS, "experts"}
    differing = [
        f"model.{key}: {found[key]} there, {wanted[key]} in the recipe"
        for key in wanted
        if key not in free and None not in (wanted[key], found[key]) and wanted[key] != found[key]
    ]
    experts = [
        None if model.experts is None else model.experts.model_dump(exclude=set(FREE_EXPERT_KEYS))
        for model in (section, recipe.model)
    ]
    if experts[0] != experts[1]:  # unset is an answer too: no experts
        there, here = (kept or "none" for kept in experts)
        differing.append(f"model.experts: {there} there, {here} in the recipe")
    # What the weights have learned to live with may be changed, but not by leaving it out.
    if is_sparse(section) and recipe.model.attention.pattern is None:
        differing.append(f"model.attention.pattern: {section.attention.pattern} there, not set in the recipe")
    if section.rotary_scaling is not None and recipe.model.rotary_scaling is None:
        differing.append(f"model.rotary_scaling: {section.rotary_scaling.type} there, not set in the recipe")
    if differing:
        raise UsageError(
            f"init_from {init_from} is another model:\n  " + "\n  ".join(differing),
            hint="give the model section of that run",
        )


def _model_writer(model: Model, tokenizer: Tokenizer | None, recipe: Recipe):  # type: ignore[no-untyped-def]
    name = Path(recipe.output or "model").name
    dtype = torch.bfloat16 if recipe.checkpoint.dtype == "bf16" else None

    def write(
        folder: Path, position: Position, metrics: Mapping[str, float], later: Later = None
    ) -> dict[str, FileRecord]:
        meta = {
            "name": name,
            "steps": position.step,
            "samples": position.consumed_samples,
            "tokens": position.extra.get("tokens"),
            "training loss": metrics.get("loss"),
            "validation loss": metrics.get("valid_loss"),
        }
        return save_model_folder(model, folder, tokenizer, meta=meta, dtype=dtype, later=later)

    return write


def _build_validator(
    source: SampleSource | None, session: Session, batch: Batch, parallel: ParallelContext
) -> Validator | None:
    """A batch of validation is a global batch; no sample is used twice in one validation."""
    recipe = session.recipe
    if source is None or recipe.evaluate.every == 0:
        return None
    return Validator(
        source,
        parallel,
        num_samples=min(recipe.evaluate.batches * batch.global_batch_size, source.samples_per_epoch),
        micro_batch_size=recipe.evaluate.micro_batch_size or batch.micro_batch_size,
        interrupt=lambda: session.stop.interrupt(parallel),
    )


def _say_plan(recipe: Recipe, batch: Batch, parallel: ParallelContext, kind: str, dtype: torch.dtype) -> None:
    label = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")
    context = f" x context {parallel.context.size}" if parallel.context.size > 1 else ""
    layout = f"tensor {parallel.tensor.size} x pipeline {parallel.pipeline.size}{context} x data {parallel.data.size}"
    log.info(
        f"{count_parameters(recipe.model):,} parameters, {label}, {kind} engine, {layout}; "
        f"{batch.global_batch_size} x {sample_tokens(recipe.model):,} tokens a step "
        f"({batch.micro_batch_size} x {batch.gradient_accumulation_steps} accumulated)"
    )
