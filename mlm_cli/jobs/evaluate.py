"""The body of ``mlm evaluate``: load a model once per task, score, write ``results.json``, show a table."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlm_cli import distributed, log
from mlm_cli.checkpoint import agree
from mlm_cli.checkpoint.hub import load_model_folder
from mlm_cli.checkpoint.manifest import check_weights
from mlm_cli.checkpoint.resolve import resolve_best
from mlm_cli.config.requests import HARNESS, RETRIEVAL, WEIGHTLESS_TASKS, EvaluateRequest, check_tasks
from mlm_cli.evaluation.documents import open_documents
from mlm_cli.evaluation.perplexity import perplexity_result, score_documents
from mlm_cli.evaluation.results import TaskResult, results_document, results_table, write_results
from mlm_cli.jobs import ensemble
from mlm_cli.jobs.evaluate_bias import evaluate_bias
from mlm_cli.jobs.evaluate_retrieval import evaluate_retrieval
from mlm_cli.jobs.evaluate_task import evaluate_task
from mlm_cli.jobs.evaluate_watermark import evaluate_watermark
from mlm_cli.jobs.evaluate_zero_shot import check_harness, evaluate_zero_shot
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

RESULTS = "results.json"


def run(request: EvaluateRequest) -> int:
    """Score what ``request`` asks for, on every rank of the job; rank 0 writes and shows. Returns the exit code.

    Standard output gets a table, or with ``--format json`` the whole document.

    Raises:
        UsageError: an unknown task, no data, or options that do not fit the model.
        DataError, CheckpointError: data or a model that cannot be used.
    """
    names = list(dict.fromkeys(request.tasks))
    check_tasks(names, request.data)
    ensemble.distinct(request)
    env = distributed.init()
    try:
        parallel = ParallelContext.create(tensor=request.tensor, device=env.device)
        members = {request.model: Path(request.model)}
        if request.retrieval is None:  # a retriever may have no model, and opens its own
            named = (request.model, *request.ensemble)
            members = agree.on_rank_zero(lambda: {name: resolve_best(name) for name in named})
            if not set(names).issubset(WEIGHTLESS_TASKS):
                agree.on_rank_zero(lambda: [check_weights(folder) for folder in members.values()])
        if harness := [name.removeprefix(HARNESS) for name in names if name.startswith(HARNESS)]:
            agree.on_rank_zero(lambda: check_harness(harness, request.data))
        started, clock = time.time(), time.perf_counter()
        results = [result for together in _together(names) for result in _score(together, request, members, parallel)]
        document = results_document(
            results,
            config=_config(request, members, parallel),
            model_name=" + ".join(members),
            started=started,
            seconds=time.perf_counter() - clock,
        )
        agree.on_rank_zero(lambda: _publish(request, document))
        return 0
    finally:
        distributed.shutdown()


def _together(names: Sequence[str]) -> list[list[str]]:
    """Each task by itself, but those of lm-evaluation-harness at once, where the first of them stands."""
    harness = [name for name in names if name.startswith(HARNESS)]
    return [harness if name in harness else [name] for name in names if name not in harness[1:]]


def _score(
    tasks: Sequence[str], request: EvaluateRequest, members: dict[str, Path], parallel: ParallelContext
) -> list[TaskResult]:
    task, folder, output = tasks[0], members[request.model], _output_folder(request)
    if task in ("crows_pairs", "stereoset"):
        return [evaluate_bias(task, request, folder, parallel, output=output)]
    if task == "watermark":
        return [evaluate_watermark(request, folder, output=output)]
    if task == RETRIEVAL:
        return [evaluate_retrieval(request, parallel, output=output)]
    if task in ("lambada", "ranked_choice") or task.startswith(HARNESS):
        return evaluate_zero_shot(tasks, request, folder, parallel, output=output)
    if task != "perplexity":
        return evaluate_task(task, request, members, parallel, output=output)
    if request.ensemble:
        return ensemble.perplexity(request, members, parallel)
    return [_perplexity(request, folder, parallel)]


def _perplexity(request: EvaluateRequest, folder: Path, parallel: ParallelContext) -> TaskResult:
    section = language_model_section(folder, request.model)
    tokenizer = agree.all_succeed(lambda: tokenizer_of(request, folder, section))
    length, prefix = context_length(request, section), prefix_of(tokenizer)
    documents = agree.all_succeed(lambda: open_documents(request.data, tokenizer, limit=request.limit))
    model, _ = agree.all_succeed(lambda: load_model_folder(folder, parallel, dtype=dtype_of(request)))
    model.eval().requires_grad_(False)
    with Progress("perplexity") as progress:
        tally = score_documents(
            model,
            documents,
            length=length,
            stride=request.stride,
            prefix=prefix,
            batch_size=request.batch_size,
            on_batch=progress.update,
        )
    facts = perplexity_facts(request, length, prefix)
    return perplexity_result(tally, documents, name="perplexity", config=facts)


def _config(request: EvaluateRequest, members: dict[str, Path], parallel: ParallelContext) -> dict[str, Any]:
    """How the model was run. Under the harness's names where it has them."""
    folder = "+".join(map(str, members.values()))
    dtype = str(dtype_of(request)).removeprefix("torch.")
    return {
        "model": "mlm",
        "model_args": f"pretrained={folder},dtype={dtype},tensor={parallel.tensor.size},data={parallel.data.size}",
        "model_dtype": dtype,
        "batch_size": request.batch_size,
        "device": str(parallel.device),
        "limit": request.limit,
        "bootstrap_iters": 1000,
        "gen_kwargs": {},
        "random_seed": request.seed,
        "request": request.to_dict(),
    }


def _publish(request: EvaluateRequest, document: dict[str, Any]) -> None:
    """Rank 0: the file, then standard output or the table."""
    folder = _output_folder(request)
    if folder is not None:
        write_results(document, folder / RESULTS)
    if request.format == "json":
        sys.stdout.write(json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n")
    else:
        sys.stdout.write(results_table(document) + "\n")
    sys.stdout.flush()
    if folder is not None:
        log.info(f"written to {folder / RESULTS}")


def _output_folder(request: EvaluateRequest) -> Path | None:
    if request.output is not None:
        return Path(request.output).expanduser()
    run_folder = Path(request.model).expanduser()
    if request.ensemble:
        return None  # what its members score together is no result of the first's
    return run_folder / "evaluate" if (run_folder / "latest").is_file() else None
