"""Scoring a fine-tuned model on labelled files: the part of ``mlm evaluate`` that goes through ``tasks``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from mlm_cli.checkpoint import agree
from mlm_cli.checkpoint.hub import check_vocabulary
from mlm_cli.config.mistakes import as_error
from mlm_cli.config.requests import EvaluateRequest
from mlm_cli.config.resolve import resolve_recipe
from mlm_cli.config.schema import ModelSection, TaskSection
from mlm_cli.config.tasks import TASK_KINDS, check_task
from mlm_cli.data.tokenizer import Tokenizer, load_tokenizer
from mlm_cli.errors import UsageError
from mlm_cli.evaluation.results import TaskResult, write_texts
from mlm_cli.evaluation.task_scores import TaskEvaluator, task_result
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.tasks.encoding import TextEncoder
from mlm_cli.tasks.registry import TASKS
from mlm_cli.tasks.task_folder import load_task_model, read_facts

_COLUMNS = {"text_column", "label_column", "text_pair_column", "choice_columns"}


def evaluate_task(
    name: str,
    request: EvaluateRequest,
    folder: Path,
    parallel: ParallelContext,
    *,
    dtype: torch.dtype,
    output: Path | None,
    on_batch: Callable[[int, int], None],
) -> TaskResult:
    """Score the model in ``folder`` on the request's files, else on the dev file of its run. All ranks call.

    Args:
        output: where the predictions go, in the form that the field's own scorers read; None: nowhere.

    Raises:
        UsageError: no file; keys that make no task.
        DataError, CheckpointError: files or a model that cannot be used.
    """
    kind = TASKS[name]
    facts = read_facts(folder, kind)
    section = task_section(name, request, folder, facts.settings)
    paths = request.data or ((section.dev,) if section.dev else ())
    if not paths:
        raise UsageError(f"{name} needs {TASK_KINDS[name].what}", hint="give one with --data")
    tokenizer = agree.all_succeed(lambda: tokenizer_of(request, folder, facts.section))
    length = min(request.max_length or facts.max_length, facts.max_length)
    examples = agree.all_succeed(lambda: [example for path in paths for example in kind.read(path, section)])
    chosen = examples[: request.limit]
    task = agree.all_succeed(lambda: kind(section, TextEncoder(tokenizer, facts.section, length), facts.labels))
    features = agree.all_succeed(lambda: task.features(chosen))
    model = agree.all_succeed(lambda: load_task_model(folder, parallel, task.head, dtype=dtype))
    model.eval().requires_grad_(False)
    evaluator = TaskEvaluator(task, chosen, features, parallel, batch_size=request.batch_size, seed=request.seed)
    scores, loss = evaluator.scores(model, on_batch)
    if output is not None:
        agree.on_rank_zero(lambda: write_texts(scores.predictions, output))
    keys = sorted(TASK_KINDS[name].keys - {"labels", "header"})
    config: dict[str, object] = {
        "dataset_path": list(paths),
        "output_type": name,
        "max_length": length,
        **{key: getattr(section, key) for key in keys},
    }
    return task_result(task, scores, loss, config=config, num_samples=len(chosen), num_original=len(examples))


def task_section(name: str, request: EvaluateRequest, folder: Path, settings: Any) -> TaskSection:
    """Columns and settings: those given by hand, else what travels with the model, else those of its run."""
    values: dict[str, Any] = {"train": "", "dev": ""}
    recipe = folder.parent.parent / "recipe.yaml"  # RUN/step-N/model
    if folder.name == "model" and recipe.is_file():
        section = resolve_recipe(str(recipe)).task
        if section is not None and section.name == name:
            values |= section.model_dump(exclude_unset=True)
    given = {key: value for key, value in request.task_keys if key != "name"}
    if given.keys() & _COLUMNS and "header" not in given:
        values.pop("header", None)  # what was true of the training file says nothing about columns named anew
    try:
        found = TaskSection(**{**values, **settings, **given, "name": name})
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"task.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    mistakes = list(check_task(found))
    if mistakes:
        raise as_error(mistakes)
    return found


def tokenizer_of(request: EvaluateRequest, folder: Path, section: ModelSection) -> Tokenizer:
    """The tokenizer asked for, else the model's own.

    Raises:
        CheckpointError: it has more tokens than the model.
    """
    tokenizer = load_tokenizer(request.tokenizer or str(folder))
    check_vocabulary(section, tokenizer, str(folder))
    return tokenizer
