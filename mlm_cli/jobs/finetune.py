"""The body of ``mlm finetune``: a pretrained model, a task's head and examples, then the loop of pretraining."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlm_cli import log
from mlm_cli.checkpoint import agree
from mlm_cli.checkpoint.hub import check_vocabulary, read_model_config, resolve_model
from mlm_cli.checkpoint.load import load_state
from mlm_cli.checkpoint.manifest import FileRecord, check_weights
from mlm_cli.checkpoint.save import Identity
from mlm_cli.checkpoint.state import Position
from mlm_cli.config.derived import Batch, batch_arithmetic
from mlm_cli.config.schema import Recipe, TaskSection
from mlm_cli.config.shapes import check_slices
from mlm_cli.config.tasks import metric_of
from mlm_cli.data.tokenizer import Tokenizer, load_tokenizer
from mlm_cli.errors import UsageError
from mlm_cli.evaluation.task_scores import TaskEvaluator
from mlm_cli.jobs.finetune_best import Best, BestCheckpointer, score_of_best
from mlm_cli.jobs.task_data import TaskData, read_task
from mlm_cli.jobs.training_parts import (
    FREE_MODEL_KEYS,
    build_monitor,
    build_numerics,
    build_schedule,
    build_statistics,
    free_settings,
    joined,
    kept_pattern,
    optimizer_settings,
    prepare_for_training,
    seed_everything,
    tell_of_hangs,
    watch_ranks,
)
from mlm_cli.models.heads import TaskModel
from mlm_cli.models.registry import build_model
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.random import RandomStreams
from mlm_cli.tasks.batches import training_batches
from mlm_cli.tasks.registry import TASKS
from mlm_cli.tasks.task import Task
from mlm_cli.tasks.task_folder import check_decoder_start, save_task_model, start_task_model
from mlm_cli.training.engine import Engine, Objective
from mlm_cli.training.engine_choice import build_engine, choose_engine
from mlm_cli.training.loop import Plan, train
from mlm_cli.training.precision import choose_dtype
from mlm_cli.training.session import Session, open_session
from mlm_cli.training.stop import Cause, StopFlag, exit_code, find_deadline

Later = list[Callable[[], None]] | None  # what is left to write, for the background


def run(recipe: Recipe) -> int:
    """Fine-tune, or go on fine-tuning, on every rank of the job.

    The checkpoint with the best ``task.metric`` on the dev file stays, and the run folder's ``best`` names it.

    Returns:
        0 when the run has taken all its steps; 75 (or 130 after Ctrl-C) when it was stopped by a signal or by its time
        limit, with a checkpoint.

    Raises:
        MlmError: see DESIGN section 1 for the exit codes.
    """
    task = recipe.task
    if task is None or recipe.init_from is None:
        raise UsageError("fine-tuning needs `task` and `init_from`", hint="start from `mlm recipe show finetune/sst2`")
    with StopFlag(find_deadline(recipe.train.time_limit)).listening() as stop:
        return _run_ranks(recipe, task, recipe.init_from, stop)


def _run_ranks(recipe: Recipe, task: TaskSection, init_from: str, stop: StopFlag) -> int:
    with joined(recipe) as parallel:
        source = resolve_model(init_from)
        tokenizer = agree.all_succeed(lambda: load_tokenizer(recipe.tokenizer or str(source)))
        batch = batch_arithmetic(recipe, parallel.world.size)
        recipe = _with_model(recipe, source, tokenizer)
        data = agree.all_succeed(lambda: read_task(task, tokenizer, recipe.model))
        with (
            watch_ranks(recipe, parallel) as watchdog,
            open_session(_with_steps(recipe, task, batch, len(data.train)), stop) as session,
        ):
            tell_of_hangs(watchdog, session)
            return _run(session, data, batch, parallel, source)


def _with_model(recipe: Recipe, source: Path, tokenizer: Tokenizer) -> Recipe:
    """The recipe with the architecture of the model it starts from; dropout and the like as the recipe says."""
    section, _ = read_model_config(source)
    assert recipe.task is not None
    TASKS[recipe.task.name].check_family(section)
    check_vocabulary(section, tokenizer, str(source))
    check_decoder_start(source, section, tokenizer)
    given = {key: getattr(recipe.model, key) for key in FREE_MODEL_KEYS if key in recipe.model.model_fields_set}
    given["attention"] = kept_pattern(recipe.model.attention, section.attention)
    section = section.model_copy(update=given)
    check_slices(section, recipe.parallel.tensor)
    return recipe.model_copy(update={"model": section})


def _with_steps(recipe: Recipe, task: TaskSection, batch: Batch, num_examples: int) -> Recipe:
    """``task.epochs`` as steps and the global batch written down: the recipe's copy means the same anywhere."""
    update: dict[str, Any] = {"global_batch_size": batch.global_batch_size}
    if task.epochs is not None:
        update["steps"] = math.ceil(task.epochs * num_examples / batch.global_batch_size)
        if recipe.schedule.warmup_steps >= update["steps"]:
            raise UsageError(
                f"schedule.warmup_steps {recipe.schedule.warmup_steps} leaves nothing of the {update['steps']} steps "
                f"of {task.epochs} epochs",
                hint=f"use schedule.warmup_steps={update['steps'] // 10}",
            )
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=update)})


def _run(session: Session, data: TaskData, batch: Batch, parallel: ParallelContext, source: Path) -> int:
    recipe = session.recipe
    session.check_data(data.fingerprint)
    if session.found is not None and session.complete:
        step = session.found.manifest.step
        log.info(f"{session.run} is complete: {step:,} steps taken; raise train.steps to go on")
        session.status.update("finished", step=step, exit_code=0)
        return 0

    start = _start(session, data, batch, parallel, source)
    best, position = start.checkpointer.best, start.position
    plan = Plan(
        steps=recipe.train.steps,
        accumulation=batch.gradient_accumulation_steps,
        global_batch_size=batch.global_batch_size,
        checkpoint_every=recipe.checkpoint.every,
        evaluate_every=recipe.evaluate.every,
        checkpoint_when=lambda step, values: best.beaten_by(values),
    )
    supply = training_batches(
        data.train,
        seed=recipe.seed,
        micro_batch_size=batch.micro_batch_size,
        global_batch_size=batch.global_batch_size,
        data_rank=parallel.data.rank,
        data_size=parallel.data.size,
        start_sample=position.consumed_samples,
    )
    evaluator = TaskEvaluator(
        data.task,
        data.dev_examples,
        data.dev,
        parallel,
        batch_size=recipe.evaluate.micro_batch_size or batch.micro_batch_size,
        seed=recipe.seed,
        interrupt=lambda: session.stop.interrupt(parallel),
    )
    # FLOP/s are not reported: they depend on the lengths of the texts.
    monitor = build_monitor(session, parallel, start.dtype, position, flops_per_token=None)
    numerics = build_numerics(session, start.engine, start.streams, parallel, start.checkpointer, position)
    with closing(monitor):
        position, received = train(
            plan,
            start.engine,
            supply,
            _objective(data.task),
            build_schedule(recipe),
            start=position,
            parallel=parallel,
            evaluator=evaluator if recipe.evaluate.every else None,
            checkpointer=start.checkpointer,
            monitor=monitor,
            stop=session.stop,
            numerics=numerics,
            statistics=build_statistics(start.model, recipe, parallel),
        )
    return _end(session, position, received, best)


def _end(session: Session, position: Position, received: Cause | None, best: Best) -> int:
    """Write down how the run ended; the exit code."""
    if received is not None:
        code = exit_code(received)
        session.status.update("stopped", step=position.step, exit_code=code, message=received.name)
        saved = ", checkpoint saved" if position.step else ""
        log.info(f"{received.name}: stopped after step {position.step:,}{saved}; the same command goes on")
        return code
    session.status.update("finished", step=position.step, exit_code=0)
    log.info(f"{session.run}: {position.step:,} steps done{best.describe()}")
    return 0


@dataclass(frozen=True)
class _Start:
    """What training goes on with: filled from the source model, or from a checkpoint of this run."""

    model: TaskModel
    engine: Engine
    streams: RandomStreams
    checkpointer: BestCheckpointer
    position: Position
    dtype: torch.dtype


def _start(session: Session, data: TaskData, batch: Batch, parallel: ParallelContext, source: Path) -> _Start:
    recipe = session.recipe
    dtype = choose_dtype(recipe.train.precision, parallel.device)
    seed_everything(recipe.seed, parallel)
    model, streams = _build_model(recipe, data, parallel, dtype, source if session.found is None else None)
    kind = choose_engine(recipe.train.engine, zero=recipe.parallel.zero, parallel=parallel)
    engine = build_engine(
        kind,
        model,
        parallel,
        optimizer_settings(recipe),
        dtype=dtype,
        accumulation=batch.gradient_accumulation_steps,
        micro_batch_size=batch.micro_batch_size,
        zero=recipe.parallel.zero,
        config_file=session.run.ds_config,
    )
    position = Position(0, 0)
    if session.found is not None:
        position = load_state(session.found, engine, streams, parallel)
        log.info(f"resuming {session.run} from {session.found.folder.name}")

    metric = f"dev_{metric_of(data.task.section)}"
    best = Best(metric, session.run.best, score_of_best(session, metric))
    checkpointer = BestCheckpointer(
        session.run,
        engine,
        parallel,
        write_model=_model_writer(model, data.task, recipe),
        streams=streams,
        identity=Identity(session.recipe_hash, data.fingerprint),
        keep_last=recipe.checkpoint.keep_last,
        background=recipe.checkpoint.background,
    )
    checkpointer.best = best
    checkpointer.check_space(3)  # the last, the best and the one being written
    _say_plan(recipe, data, batch, kind, dtype)
    return _Start(model, engine, streams, checkpointer, position, dtype)


def _objective(task: Task) -> Objective:
    """The task's loss, a mean over the micro-batch."""

    def objective(model: TaskModel, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        loss, _ = task.loss(model(batch), batch)
        return loss, {"tokens": task.count_tokens(batch)}

    return objective


def _build_model(
    recipe: Recipe, data: TaskData, parallel: ParallelContext, dtype: torch.dtype, source: Path | None
) -> tuple[TaskModel, RandomStreams]:
    """The model in float32, with the weights in ``source``; None: unfilled, a checkpoint will fill it."""
    if source is not None:
        agree.on_rank_zero(lambda: check_weights(source))
        changes, spec = free_settings(recipe.model), data.task.head
        model = agree.all_succeed(lambda: start_task_model(source, parallel, spec, seed=recipe.seed, changes=changes))
    else:
        head = data.task.head
        model = TaskModel(build_model(recipe.model, parallel, init=False, head=head.own), head, seed=None)
    streams = prepare_for_training(model.backbone, recipe, parallel, dtype)
    return model.train(), streams


def _model_writer(model: TaskModel, task: Task, recipe: Recipe) -> Callable[..., dict[str, FileRecord]]:
    dtype = torch.bfloat16 if recipe.checkpoint.dtype == "bf16" else None

    def write(
        folder: Path, position: Position, metrics: Mapping[str, float], later: Later = None
    ) -> dict[str, FileRecord]:
        meta = {
            "name": Path(recipe.output or "model").name,
            "started from": recipe.init_from,
            "steps": position.step,
            "examples": position.consumed_samples,
            "training loss": metrics.get("loss"),
            **{
                f"{name.removeprefix('dev_').replace('_', ' ')} on the dev file": value
                for name, value in metrics.items()
                if name.startswith("dev_")
            },
        }
        return save_task_model(model, task, folder, meta=meta, dtype=dtype, later=later)

    return write


def _say_plan(recipe: Recipe, data: TaskData, batch: Batch, kind: str, dtype: torch.dtype) -> None:
    epochs = recipe.train.steps * batch.global_batch_size / len(data.train)
    label = "bf16" if dtype == torch.bfloat16 else "fp32"
    labels = f", labels {', '.join(data.task.labels)}" if data.task.labels else ""
    log.info(
        f"{data.task.name.replace('_', ' ')}: {len(data.train):,} samples for training, {len(data.dev):,} for dev"
        f"{labels}; {recipe.train.steps:,} steps of {batch.global_batch_size} ({epochs:.1f} epochs), {label}, {kind} "
        "engine"
    )
