"""``mlm evaluate --ensemble``: perplexity under the averaged probabilities of several models. (The tasks of fine-tuning
are averaged in ``jobs.evaluate_task``.)

The ensemble's result comes first, then that of each member alone, named ``TASK MODEL``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from mlm_cli.checkpoint import agree
from mlm_cli.checkpoint.hub import load_model_folder
from mlm_cli.config.requests import EvaluateRequest
from mlm_cli.errors import UsageError
from mlm_cli.evaluation.documents import open_documents
from mlm_cli.evaluation.ensemble import check_same_tokenizer, score_ensemble
from mlm_cli.evaluation.perplexity import perplexity_result
from mlm_cli.evaluation.results import TaskResult
from mlm_cli.jobs.scoring_parts import (
    Progress,
    context_length,
    dtype_of,
    language_model_section,
    perplexity_facts,
    prefix_of,
    tokenizer_of,
)
from mlm_cli.parallel.context import ParallelContext

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


def _named(results: Sequence[TaskResult], members: Members) -> list[TaskResult]:
    """The first for the ensemble, which lists its members; each other by the member's name."""
    pooled, *alone = results
    pooled = replace(pooled, config={**pooled.config, "ensemble": list(members), "average": "probabilities"})
    return [pooled, *(replace(one, name=f"{one.name} {name}") for one, name in zip(alone, members, strict=True))]


def distinct(request: EvaluateRequest) -> None:
    """Refuse a model that is named twice: its probabilities would count double.

    Raises:
        UsageError: naming it.
    """
    names = [request.model, *request.ensemble]
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise UsageError(f"`{twice}` is named twice in the ensemble", hint="name each model once")
