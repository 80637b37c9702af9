"""``mlm evaluate --ensemble``: the tasks of ``jobs.evaluate`` for the averaged probabilities of several models.

Each task gives the ensemble's result, then that of each member alone, named ``TASK MODEL``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from mlm_cli.checkpoint import agree
from mlm_cli.checkpoint.hub import load_model_folder, read_model_config
from mlm_cli.config.requests import EvaluateRequest
from mlm_cli.errors import UsageError
from mlm_cli.evaluation.classify import classification_result
from mlm_cli.evaluation.documents import open_documents
from mlm_cli.evaluation.ensemble import (
    check_same_tokenizer,
    class_probabilities,
    confusion_and_loss,
    order_of_labels,
    score_ensemble,
)
from mlm_cli.evaluation.perplexity import perplexity_result
from mlm_cli.evaluation.results import TaskResult
from mlm_cli.jobs.scoring_parts import (
    Progress,
    classification_facts,
    context_length,
    dtype_of,
    language_model_section,
    perplexity_facts,
    prefix_of,
    read_labelled,
    task_section,
    tokenizer_of,
)
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.tasks.classification import encode_examples
from mlm_cli.tasks.classifier_folder import load_classifier, read_facts

Members = dict[str, Path]  # what the user called each model, and its folder


def perplexity(request: EvaluateRequest, members: Members, parallel: ParallelContext) -> list[TaskResult]:
    """Perplexity under the mean of the next-token probabilities; all models are in memory together.

    Raises:
        UsageError: tokenizers that differ, a classifier, or no data.
    """
    sections = {name: language_model_section(folder, name) for name, folder in members.items()}
    tokenizers = agree.all_succeed(
        lambda: {name: tokenizer_of(request, folder, sections[name]) for name, folder in members.items()}
    )
    check_same_tokenizer(tokenizers)
    tokenizer = next(iter(tokenizers.values()))
    length = min(context_length(request, section) for section in sections.values())
    documents = agree.all_succeed(lambda: open_documents(request.data, tokenizer, limit=request.limit))
    models = [
        agree.all_succeed(partial(load_model_folder, folder, parallel, dtype=dtype_of(request)))[0]
        for folder in members.values()
    ]
    for model in models:
        model.eval().requires_grad_(False)
    with Progress("perplexity") as progress:
        tallies = score_ensemble(
            models,
            documents,
            length=length,
            stride=request.stride,
            prefix=prefix_of(tokenizer),
            batch_size=request.batch_size,
            on_batch=progress.update,
        )
    facts = perplexity_facts(request, length, prefix_of(tokenizer))
    results = [perplexity_result(tally, documents, name="perplexity", config=facts) for tally in tallies]
    return _named(results, members)


def classification(request: EvaluateRequest, members: Members, parallel: ParallelContext) -> list[TaskResult]:
    """Scores under the mean of the class probabilities; one model at a time is in memory, each with its own tokenizer.

    Raises:
        UsageError: label names that differ, or no data.
        CheckpointError: a member that is no classifier.
    """
    first_name, first = next(iter(members.items()))
    task = task_section(request, first)
    paths, examples = agree.all_succeed(lambda: read_labelled(request, task))
    chosen = examples[: request.limit]
    facts = {name: read_facts(folder) for name, folder in members.items()}
    reference = facts[first_name].labels
    # before any weight is read
    orders = {name: order_of_labels(fact.labels, reference, (name, first_name)) for name, fact in facts.items()}
    probabilities: list[np.ndarray] = []
    lengths = []
    for name, folder in members.items():
        section, _ = read_model_config(folder)
        tokenizer = agree.all_succeed(partial(tokenizer_of, request, folder, section))
        lengths.append(min(context_length(request, section), facts[name].max_length))
        features = agree.all_succeed(partial(encode_examples, chosen, facts[name].labels, tokenizer, lengths[-1]))
        model, _ = agree.all_succeed(partial(load_classifier, folder, parallel, dtype=dtype_of(request)))
        with Progress(f"classification, {name}") as progress:
            found = class_probabilities(
                model.requires_grad_(False),
                features,
                parallel,
                num_labels=len(reference),
                pad_id=facts[name].pad_id,
                batch_size=request.batch_size,
                on_batch=progress.update,
            )
        probabilities.append(found[:, orders[name]])
    numbers = {label: number for number, label in enumerate(reference)}
    labels = np.array([numbers[example.label] for example in chosen], dtype=np.int64)
    config = classification_facts(paths, task, min(lengths))
    results = [
        classification_result(
            *confusion_and_loss(each, labels), reference, seed=request.seed, config=config, num_original=len(examples)
        )
        for each in (np.mean(probabilities, axis=0), *probabilities)
    ]
    return _named(results, members)


def _named(results: Sequence[TaskResult], members: Members) -> list[TaskResult]:
    """The first for the ensemble, which lists its members; each other by the member's name."""
    pooled, *alone = results
    pooled = replace(pooled, config={**pooled.config, "ensemble": list(members), "average": "probabilities"})
    return [pooled, *(replace(one, name=f"{one.name} {name}") for one, name in zip(alone, members, strict=True))]


TASKS: dict[str, Callable[[EvaluateRequest, Members, ParallelContext], list[TaskResult]]] = {
    "perplexity": perplexity,
    "classification": classification,
}


def distinct(request: EvaluateRequest) -> None:
    """Refuse a model that is named twice: its probabilities would count double.

    Raises:
        UsageError: naming it.
    """
    names = [request.model, *request.ensemble]
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise UsageError(f"`{twice}` is named twice in the ensemble", hint="name each model once")
