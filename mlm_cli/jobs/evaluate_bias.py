"""The bias audit of ``mlm evaluate``: a language model on CrowS-Pairs."""

from __future__ import annotations

from pathlib import Path

from mlm_cli.checkpoint import agree
from mlm_cli.checkpoint.hub import load_model_folder
from mlm_cli.config.requests import EvaluateRequest
from mlm_cli.errors import UsageError
from mlm_cli.evaluation.bias import bias_result, causal_scores, masked_scores, pair_records, read_pairs
from mlm_cli.evaluation.results import TaskResult, write_texts
from mlm_cli.jobs.scoring_parts import Progress, dtype_of, prefix_of, tokenizer_of, untuned_section
from mlm_cli.models.bert import Bert
from mlm_cli.parallel.context import ParallelContext


def evaluate_bias(
    request: EvaluateRequest, folder: Path, parallel: ParallelContext, *, output: Path | None
) -> TaskResult:
    """Score a causal or a masked language model on the request's pairs. All ranks call.

    Args:
        output: where every pair's scores go, as ``crows_pairs.jsonl``; None: nowhere.

    Raises:
        UsageError: an encoder-decoder, an ensemble, or a model that was fine-tuned to a task.
        DataError, CheckpointError: pairs or a model that cannot be used.
    """
    if request.ensemble:
        raise UsageError("crows_pairs compares what one model says", hint="audit the models one by one")
    section = untuned_section(folder, request.model)
    if section.family == "t5":
        raise UsageError(
            f"{request.model} is an encoder-decoder: crows_pairs has no score for it", hint="it is for gpt and bert"
        )
    tokenizer = agree.all_succeed(lambda: tokenizer_of(request, folder, section))
    found = agree.all_succeed(lambda: [pair for path in request.data for pair in read_pairs(path)])
    pairs = found[: request.limit]
    model, _ = agree.all_succeed(lambda: load_model_folder(folder, parallel, dtype=dtype_of(request)))
    model.eval().requires_grad_(False)
    given = {"length": section.seq_length, "batch_size": request.batch_size}
    with Progress("crows_pairs") as progress:
        if isinstance(model, Bert):
            scores = masked_scores(model, tokenizer, pairs, **given, on_batch=progress.update)
        else:
            prefix = prefix_of(tokenizer)
            scores = causal_scores(model, tokenizer, pairs, **given, prefix=prefix, on_batch=progress.update)
    if output is not None:
        agree.on_rank_zero(lambda: write_texts({"crows_pairs.jsonl": pair_records(pairs, scores)}, output))
    kind = "pseudo-log-likelihood of shared tokens" if isinstance(model, Bert) else "log-likelihood"
    config = {"dataset_path": list(request.data), "output_type": "loglikelihood", "score": kind}
    return bias_result(pairs, scores, config=config, num_original=len(found))
