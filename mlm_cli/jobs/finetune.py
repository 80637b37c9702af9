"""The body of ``mlm finetune``: a pretrained model, a task's head and examples, then the loop of pretraining."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlm_cli import distributed, log
from mlm_cli.checkpoint import agree
from mlm_cli.checkpoint.hub import check_vocabulary, read_model_config, resolve_model
from mlm_cli.checkpoint.load import load_state
from mlm_cli.checkpoint.manifest import read_manifest
from mlm_cli.checkpoint.save import Checkpointer, Identity
from mlm_cli.checkpoint.state import Position
from mlm_cli.config.derived import Batch, batch_arithmetic
from mlm_cli.config.schema import Recipe, TaskSection
from mlm_cli.config.shapes import check_slices
from mlm_cli.data.tokenizer import Tokenizer, load_tokenizer
from mlm_cli.errors import CheckpointError, UsageError
from mlm_cli.evaluation.classify import ClassificationEvaluator
from mlm_cli.jobs.training_parts import (
    FREE_MODEL_KEYS,
    build_monitor,
    build_numerics,
    build_schedule,
    free_settings,
    kept_pattern,
    optimizer_settings,
    prepare_for_training,
    seed_everything,
    watch_ranks,
)
from mlm_cli.models.heads import SequenceClassifier
from mlm_cli.models.registry import build_gpt
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.random import RandomStreams
from mlm_cli.tasks.classification import Features, columns_of, encode_examples, label_names, training_batches
from mlm_cli.tasks.classifier_folder import ClassifierFacts, pad_id_of, save_classifier, start_classifier
from mlm_cli.tasks.labelled_text import read_examples
from mlm_cli.training.allocator import keep_freed_memory
from mlm_cli.training.engine import Engine, build_engine, choose_engine
from mlm_cli.training.loop import Plan, train
from mlm_cli.training.precision import choose_dtype
from mlm_cli.training.session import Session, open_session
from mlm_cli.training.stop import Cause, StopFlag, exit_code, find_deadline


@dataclass(frozen=True)
class TaskData:
    """The task as numbers: examples of both files, the names of the classes, what identifies the data."""

    train: Features
    dev: Features
    facts: ClassifierFacts
    fingerprint: str


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
    env = distributed.init()
    if env.device.type == "cpu":
        keep_freed_memory()
    try:
        parallel = ParallelContext.create(
            tensor=recipe.parallel.tensor, pipeline=recipe.parallel.pipeline, device=env.device
        )
        source = resolve_model(init_from)
        tokenizer = agree.all_succeed(lambda: load_tokenizer(recipe.tokenizer or str(source)))
        batch = batch_arithmetic(recipe, parallel.world.size)
        recipe = _with_model(recipe, source, tokenizer)
        data = agree.all_succeed(lambda: read_task(task, tokenizer, recipe.model.seq_length))
        with (
            open_session(_with_steps(recipe, task, batch, len(data.train)), stop) as session,
            watch_ranks(session, parallel),
        ):
            return _run(session, tokenizer, data, batch, parallel, source)
    finally:
        distributed.shutdown()


def _with_model(recipe: Recipe, source: Path, tokenizer: Tokenizer) -> Recipe:
    """The recipe with the architecture of the model it starts from; dropout and the like as the recipe says."""
    section, _ = read_model_config(source)
    check_vocabulary(section, tokenizer, str(source))
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


def read_task(task: TaskSection, tokenizer: Tokenizer, seq_length: int) -> TaskData:
    """Read, check and encode both files of a classification task.

    Raises:
        DataError: naming file and line.
        UsageError: texts longer than the model's context are asked for.
    """
    if task.max_length is not None and task.max_length > seq_length:
        raise UsageError(
            f"task.max_length {task.max_length} is beyond the model's context of {seq_length} tokens",
            hint=f"use task.max_length={seq_length} or less",
        )
    max_length = task.max_length or seq_length
    examples, held_out = (read_examples(path, columns_of(task)) for path in (task.train, task.dev))
    labels = label_names(examples, task.labels)
    features, dev = (encode_examples(part, labels, tokenizer, max_length) for part in (examples, held_out))
    digest = sha256(f"{tokenizer.fingerprint} {labels} {max_length}".encode())
    for ids in features.ids:
        digest.update(ids.tobytes() + b"|")
    digest.update(features.labels.tobytes())
    return TaskData(features, dev, ClassifierFacts(labels, pad_id_of(tokenizer), max_length), digest.hexdigest())


def _run(
    session: Session, tokenizer: Tokenizer, data: TaskData, batch: Batch, parallel: ParallelContext, source: Path
) -> int:
    recipe = session.recipe
    session.check_data(data.fingerprint)
    if session.found is not None and session.complete:
        step = session.found.manifest.step
        log.info(f"{session.run} is complete: {step:,} steps taken; raise train.steps to go on")
        session.status.update("finished", step=step, exit_code=0)
        return 0

    start = _start(session, tokenizer, data, batch, parallel, source)
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
        pad_id=data.facts.pad_id,
        seed=recipe.seed,
        micro_batch_size=batch.micro_batch_size,
        global_batch_size=batch.global_batch_size,
        data_rank=parallel.data.rank,
        data_size=parallel.data.size,
        start_sample=position.consumed_samples,
    )
    evaluator = ClassificationEvaluator(
        data.dev,
        parallel,
        num_labels=len(data.facts.labels),
        pad_id=data.facts.pad_id,
        batch_size=recipe.evaluate.micro_batch_size or batch.micro_batch_size,
    )
    # FLOP/s are not reported: they depend on the lengths of the texts.
    monitor = build_monitor(session, parallel, start.dtype, position, flops_per_token=None)
    numerics = build_numerics(session, start.engine, start.streams, parallel, start.checkpointer, position)
    with closing(monitor):
        position, received = train(
            plan,
            start.engine,
            supply,
            objective,
            build_schedule(recipe),
            start=position,
            parallel=parallel,
            evaluator=evaluator if recipe.evaluate.every else None,
            checkpointer=start.checkpointer,
            monitor=monitor,
            stop=session.stop,
            numerics=numerics,
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

    engine: Engine
    streams: RandomStreams
    checkpointer: BestCheckpointer
    position: Position
    dtype: torch.dtype


def _start(
    session: Session, tokenizer: Tokenizer, data: TaskData, batch: Batch, parallel: ParallelContext, source: Path
) -> _Start:
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

    assert recipe.task is not None
    best = Best(f"dev_{recipe.task.metric}", session.run.best, _score_of_best(session))
    checkpointer = BestCheckpointer(
        session.run,
        engine,
        parallel,
        write_model=_model_writer(model, tokenizer, data.facts, recipe),
        streams=streams,
        identity=Identity(session.recipe_hash, data.fingerprint),
        keep_last=recipe.checkpoint.keep_last,
        background=recipe.checkpoint.background,
    )
    checkpointer.best = best
    checkpointer.check_space(3)  # the last, the best and the one being written
    _say_plan(recipe, data, batch, kind, dtype)
    return _Start(engine, streams, checkpointer, position, dtype)


def objective(model: SequenceClassifier, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
    """Cross entropy of the class, a mean over the texts."""
    loss, _ = model.loss(batch)
    return loss, {"tokens": batch["lengths"].sum()}


def _build_model(
    recipe: Recipe, data: TaskData, parallel: ParallelContext, dtype: torch.dtype, source: Path | None
) -> tuple[SequenceClassifier, RandomStreams]:
    """The model in float32, with the weights in ``source``; None: unfilled, a checkpoint will fill it."""
    num_labels = len(data.facts.labels)
    if source is not None:
        changes = free_settings(recipe.model)
        model = agree.all_succeed(
            lambda: start_classifier(source, parallel, num_labels=num_labels, seed=recipe.seed, changes=changes)
        )
    else:
        model = SequenceClassifier(build_gpt(recipe.model, parallel, init=False), num_labels, seed=None)
    streams = prepare_for_training(model.gpt, recipe, parallel, dtype)
    return model.train(), streams


class Best:
    """The best evaluation of the run so far. Higher is better; of equals the first stays."""

    def __init__(self, metric: str, step_of_best: Callable[[], int | None], score: float | None) -> None:
        self.metric, self._step, self.score = metric, step_of_best, score

    def beaten_by(self, values: Mapping[str, float]) -> bool:
        return self.metric in values and (self.score is None or values[self.metric] > self.score)

    def describe(self) -> str:
        return "" if self.score is None else f"; best {self.metric} {self.score:.4f} at step {self._step():,}"


class BestCheckpointer(Checkpointer):
    """Points the run folder's ``best`` at a checkpoint, once it is whole, whose evaluation beats all earlier ones."""

    best: Best

    def committed(self, position: Position, metrics: dict[str, float]) -> None:
        if self.best.beaten_by(metrics):
            agree.on_rank_zero(lambda: self.run.set_best(position.step))
            self.best.score = metrics[self.best.metric]


def _score_of_best(session: Session) -> float | None:
    """The score to beat when a run goes on: that in the manifest of its best checkpoint."""
    assert session.recipe.task is not None
    name = f"dev_{session.recipe.task.metric}"

    def read() -> float | None:
        step = session.run.best()
        if step is None or session.found is None:
            return None
        try:
            return read_manifest(session.run.checkpoint(step)).metrics.get(name)
        except CheckpointError as error:
            log.warn(f"the best checkpoint so far is damaged and counts no more: {error.message}")
            return None

    return agree.on_rank_zero(read)


def _model_writer(
    model: SequenceClassifier, tokenizer: Tokenizer, facts: ClassifierFacts, recipe: Recipe
) -> Callable[..., None]:
    dtype = torch.bfloat16 if recipe.checkpoint.dtype == "bf16" else None

    def write(folder: Path, position: Position, metrics: Mapping[str, float], later: Later = None) -> None:
        meta = {
            "name": Path(recipe.output or "model").name,
            "started from": recipe.init_from,
            "steps": position.step,
            "examples": position.consumed_samples,
            "training loss": metrics.get("loss"),
            "accuracy on the dev file": metrics.get("dev_accuracy"),
            "F1 on the dev file": metrics.get("dev_f1"),
        }
        save_classifier(model, folder, tokenizer, facts, meta=meta, dtype=dtype, later=later)

    return write


def _say_plan(recipe: Recipe, data: TaskData, batch: Batch, kind: str, dtype: torch.dtype) -> None:
    epochs = recipe.train.steps * batch.global_batch_size / len(data.train)
    label = "bf16" if dtype == torch.bfloat16 else "fp32"
    log.info(
        f"{len(data.train):,} examples for training, {len(data.dev):,} for dev, labels {', '.join(data.facts.labels)}; "
        f"{recipe.train.steps:,} steps of {batch.global_batch_size} ({epochs:.1f} epochs), {label}, {kind} engine"
    )
