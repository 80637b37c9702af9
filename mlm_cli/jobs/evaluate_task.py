"""Scoring fine-tuned models on labelled files: the part of ``mlm evaluate`` that goes through ``tasks``.

Several models are one ensemble: what they say of each example is averaged, whatever their families and tokenizers; one
at a time is in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mlm_cli.checkpoint import agree
from mlm_cli.checkpoint.text_ends import end_ids
from mlm_cli.config.mistakes import as_error
from mlm_cli.config.requests import EvaluateRequest
from mlm_cli.config.resolve import resolve_recipe
from mlm_cli.config.schema import TaskSection
from mlm_cli.config.tasks import TASK_KINDS, check_task
from mlm_cli.errors import UsageError
from mlm_cli.evaluation.ensemble import order_of_labels
from mlm_cli.evaluation.results import TaskResult, write_texts
from mlm_cli.evaluation.task_scores import TaskEvaluator, task_result
from mlm_cli.jobs.scoring_parts import Progress, context_length, dtype_of, tokenizer_of
from mlm_cli.jobs.task_data import check_max_length
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.tasks.encoding import TextEncoder
from mlm_cli.tasks.registry import TASKS
from mlm_cli.tasks.task import Task
from mlm_cli.tasks.task_folder import TaskFacts, check_decoder_start, load_task_model, read_facts
from mlm_cli.tasks.writing import Writing

_COLUMNS = {"text_column", "label_column", "text_pair_column", "choice_columns"}


@dataclass(frozen=True)
class _Member:
    """What one model says of each example, with the classes in the order of the first model's; its mean loss."""

    task: Task
    answers: list[Any]
    loss: float


def evaluate_task(
    name: str, request: EvaluateRequest, members: Mapping[str, Path], parallel: ParallelContext, *, output: Path | None
) -> list[TaskResult]:
    """Score models on the request's files, else on the dev file of the first one's run. All ranks call.

    Args:
        members: what the user called each model, and its folder; several are an ensemble.
        output: where the predictions go, in the form that the field's own scorers read; None: nowhere.

    Returns:
        the result of the one model; or that of the ensemble, then that of each member, named ``TASK MODEL``.

    Raises:
        UsageError: no file; keys that make no task; classes that differ.
        DataError, CheckpointError: files or models that cannot be used.
    """
    kind = TASKS[name]
    facts = {member: read_facts(folder, kind) for member, folder in members.items()}
    first = next(iter(members))
    orders = {
        member: order_of_labels(found.labels, facts[first].labels, (member, first)) for member, found in facts.items()
    }  # before any weight is read
    section = task_section(name, request, members[first], facts[first].settings)
    given = {key for key, _ in request.task_keys}
    sections = {
        member: section.model_copy(update={k: v for k, v in about.settings.items() if k not in given})
        for member, about in facts.items()
    }
    kind.check_together(sections)
    paths = request.data or ((section.dev,) if section.dev else ())
    if not paths:
        raise UsageError(f"{name} needs {TASK_KINDS[name].what}", hint="give one with --data")
    examples = agree.all_succeed(lambda: [example for path in paths for example in kind.read(path, section)])
    chosen = examples[: request.limit]
    found = [
        _ask(member, request, folder, facts[member], sections[member], chosen, orders[member], parallel)
        for member, folder in members.items()
    ]
    length = min(member.task.encoder.max_length for member in found)
    counts = {"num_samples": len(chosen), "num_original": len(examples)}
    # Answers have the classes in the order of the first model's; the other settings are each model's own.
    scorers = [kind(member.task.section, member.task.encoder, facts[first].labels) for member in found]
    scores = [
        task.score(member.answers, chosen, seed=request.seed) for task, member in zip(scorers, found, strict=True)
    ]
    results = [
        task_result(task, s, m.loss, config=_config(name, task.section, paths, length), **counts)
        for task, s, m in zip(scorers, scores, found, strict=True)
    ]
    if len(found) > 1:
        task = scorers[0]
        pooled = task.pool([member.answers for member in found])
        scores.insert(0, task.score(pooled, chosen, seed=request.seed))
        config = _config(name, task.section, paths, length)
        config |= {"ensemble": list(members), "average": "probabilities"}
        whole = task_result(task, scores[0], task.loss_of(pooled, chosen), config=config, **counts)
        alone = [replace(one, name=f"{name} {member}") for one, member in zip(results, members, strict=True)]
        results = [whole, *alone]
    if output is not None:
        agree.on_rank_zero(lambda: write_texts(scores[0].predictions, output))
    return results


def _config(name: str, section: TaskSection, paths: Sequence[str], length: int) -> dict[str, object]:
    """What the numbers depend on, for ``results.json``."""
    keys = sorted(TASK_KINDS[name].keys - {"labels", "header"})
    return {
        "dataset_path": list(paths),
        "output_type": name,
        "max_length": length,
        **{key: getattr(section, key) for key in keys},
    }


def _ask(
    name: str,
    request: EvaluateRequest,
    folder: Path,
    facts: TaskFacts,
    section: TaskSection,
    examples: Sequence[Any],
    order: Sequence[int],
    parallel: ParallelContext,
) -> _Member:
    """What the model in ``folder`` says of the examples."""
    kind = TASKS[section.name]
    tokenizer = agree.all_succeed(partial(tokenizer_of, request, folder, facts.section))
    check_decoder_start(folder, facts.section, tokenizer)
    length = facts.max_length
    if "max_length" in dict(request.task_keys) and section.max_length is not None:  # not that of the first model's run
        check_max_length(section, facts.section.seq_length)
        length = section.max_length
    length = min(length, context_length(request, facts.section))
    task = agree.all_succeed(lambda: kind(section, TextEncoder(tokenizer, facts.section, length), facts.labels))
    if isinstance(task, Writing):
        task.end_ids = end_ids(folder, tokenizer)
    features = agree.all_succeed(lambda: task.features(examples))
    model = agree.all_succeed(lambda: load_task_model(folder, parallel, task.head, dtype=dtype_of(request)))
    model.eval().requires_grad_(False)
    evaluator = TaskEvaluator(task, examples, features, parallel, batch_size=request.batch_size, seed=request.seed)
    what = section.name.replace("_", " ")
    with Progress(f"{what}, {name}" if request.ensemble else what) as progress:
        answers, loss = evaluator.answers(model, progress.update)
    return _Member(task, task.reordered(answers, order), loss)


def task_section(name: str, request: EvaluateRequest, folder: Path, settings: Mapping[str, Any]) -> TaskSection:
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
