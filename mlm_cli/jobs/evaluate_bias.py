"""The bias audits of ``mlm evaluate``: a language model on CrowS-Pairs or StereoSet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlm_cli.checkpoint import agree
from mlm_cli.checkpoint.hub import load_model_folder
from mlm_cli.config.requests import EvaluateRequest
from mlm_cli.data.tokenizer import Tokenizer
from mlm_cli.errors import UsageError
from mlm_cli.evaluation import bias, stereoset
from mlm_cli.evaluation.results import TaskResult, write_texts
from mlm_cli.jobs.scoring_parts import Progress, dtype_of, prefix_of, tokenizer_of, untuned_section
from mlm_cli.models.bert import Bert
from mlm_cli.parallel.context import ParallelContext

OnBatch = Callable[[int, int], None]


def evaluate_bias(
    task: str, request: EvaluateRequest, folder: Path, parallel: ParallelContext, *, output: Path | None
) -> TaskResult:
    """Score a causal or a masked language model on the request's sentences. All ranks call.

    Args:
        task: ``crows_pairs`` or ``stereoset``.
        output: where the scores of all sentences go, as ``TASK.jsonl``; None: nowhere.

    Raises:
        UsageError: an encoder-decoder, an ensemble, or a model that was fine-tuned to a task.
        DataError, CheckpointError: sentences or a model that cannot be used.
    """
    if request.ensemble:
        raise UsageError(f"{task} compares what one model says", hint="audit the models one by one")
    section = untuned_section(folder, request.model)
    if section.family == "t5":
        raise UsageError(
            f"{request.model} is an encoder-decoder: {task} has no score for it", hint="it is for gpt and bert"
        )
    tokenizer = agree.all_succeed(lambda: tokenizer_of(request, folder, section))
    read = bias.read_pairs if task == "crows_pairs" else stereoset.read_clusters
    found = agree.all_succeed(lambda: [item for path in request.data for item in read(path)])
    items: Any = found[: request.limit]
    model, _ = agree.all_succeed(lambda: load_model_folder(folder, parallel, dtype=dtype_of(request)))
    model.eval().requires_grad_(False)
    given = {"length": section.seq_length, "batch_size": request.batch_size}
    audit = _crows_pairs if task == "crows_pairs" else _stereoset
    with Progress(task) as progress:
        scores, records, kind = audit(model, tokenizer, items, given, progress.update)
    if output is not None:
        agree.on_rank_zero(lambda: write_texts({f"{task}.jsonl": records}, output))
    config = {"dataset_path": list(request.data), "output_type": "loglikelihood", "score": kind}
    result = bias.bias_result if task == "crows_pairs" else stereoset.stereoset_result
    return result(items, scores, config=config, num_original=len(found))


def _crows_pairs(
    model: Any, tokenizer: Tokenizer, pairs: Sequence[bias.Pair], given: dict[str, int], update: OnBatch
) -> tuple[np.ndarray, str, str]:
    """Scores, records, and what the scores are."""
    if isinstance(model, Bert):
        scores = bias.masked_scores(model, tokenizer, pairs, **given, on_batch=update)
        return scores, bias.pair_records(pairs, scores), "pseudo-log-likelihood of shared tokens"
    scores = bias.causal_scores(model, tokenizer, pairs, **given, prefix=prefix_of(tokenizer), on_batch=update)
    return scores, bias.pair_records(pairs, scores), "log-likelihood"


def _stereoset(
    model: Any, tokenizer: Tokenizer, clusters: Sequence[stereoset.Cluster], given: dict[str, int], update: OnBatch
) -> tuple[np.ndarray, str, str]:
    """Scores, records, and what the scores are."""
    masked = isinstance(model, Bert)
    score = stereoset.masked_scores if masked else stereoset.causal_scores
    scores = score(model, tokenizer, clusters, **given, on_row=update)
    kind = "mean probability of the word's tokens" if masked else "geometric mean of token probabilities"
    return scores, stereoset.cluster_records(clusters, scores), kind
