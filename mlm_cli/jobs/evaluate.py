"""The body of ``mlm evaluate``: load a model once per task, score, write ``results.json``, show a table."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mlm_cli import distributed, log
from mlm_cli.checkpoint import agree
from mlm_cli.checkpoint.hub import load_model_folder, read_model_config, resolve_model, task_class
from mlm_cli.config.requests import EVALUATION_TASKS, EvaluateRequest
from mlm_cli.errors import UsageError
from mlm_cli.evaluation.documents import open_documents
from mlm_cli.evaluation.perplexity import perplexity_result, score_documents
from mlm_cli.evaluation.results import TaskResult, results_document, results_table, write_results
from mlm_cli.jobs.evaluate_task import evaluate_task, tokenizer_of
from mlm_cli.parallel.context import ParallelContext

if TYPE_CHECKING:
    from mlm_cli.config.schema import ModelSection

RESULTS = "results.json"


def run(request: EvaluateRequest) -> int:
    """Score what ``request`` asks for, on every rank of the job; rank 0 writes and shows. Returns the exit code.

    Standard output gets a table, or with ``--format json`` the whole document.

    Raises:
        UsageError: an unknown task, no data, or options that do not fit the model.
        DataError, CheckpointError: data or a model that cannot be used.
    """
    tasks = [_task_named(name) for name in dict.fromkeys(request.tasks)]
    env = distributed.init()
    try:
        parallel = ParallelContext.create(tensor=request.tensor, device=env.device)
        folder = agree.on_rank_zero(lambda: resolve(request.model))
        started, clock = time.time(), time.perf_counter()
        results = [task(request, folder, parallel) for task in tasks]
        document = results_document(
            results,
            config=_config(request, folder, parallel),
            model_name=request.model,
            started=started,
            seconds=time.perf_counter() - clock,
        )
        agree.on_rank_zero(lambda: _publish(request, document))
        return 0
    finally:
        distributed.shutdown()


def resolve(model: str) -> Path:
    """The folder that ``model`` means: as everywhere, but of a fine-tuned run its best checkpoint, not its latest."""
    best = Path(model).expanduser() / "best"
    if best.is_file():
        name = best.read_text(encoding="utf-8").strip()
        if (best.parent / name / "model" / "config.json").is_file():
            log.info(f"scoring {name}, the best checkpoint of {model}")
            return best.parent / name / "model"
        log.warn(f"{best} names {name}, which is not there: scoring the latest checkpoint")
    return resolve_model(model)


def _task_named(name: str) -> Callable[[EvaluateRequest, Path, ParallelContext], TaskResult]:
    if name not in EVALUATION_TASKS:
        raise UsageError(f"unknown task `{name}`", hint=f"known tasks: {', '.join(EVALUATION_TASKS)}")
    return _perplexity if name == "perplexity" else partial(_labelled, name)


def _perplexity(request: EvaluateRequest, folder: Path, parallel: ParallelContext) -> TaskResult:
    if not request.data:
        raise UsageError("perplexity needs text", hint="give files or an indexed prefix with --data")
    section, config = read_model_config(folder)
    if task_class(config) is not None:
        name = config.get("mlm_task", dict, {}).get("name", "classification")
        raise UsageError(f"{request.model} was fine-tuned to a task: it predicts no text", hint=f"use --task {name}")
    if section.family != "gpt":
        raise UsageError(
            f"{request.model} is of the {section.family} family: it has no probability of a text from left to right",
            hint="perplexity is a measure of causal language models",
        )
    tokenizer = agree.all_succeed(lambda: tokenizer_of(request, folder, section))
    length = _context_length(request, section)
    documents = agree.all_succeed(lambda: open_documents(request.data, tokenizer, limit=request.limit))
    # Training data has an end-of-document id before each document: it makes the first token predictable too.
    prefix = tokenizer.eod_id if tokenizer.eod_id is not None else tokenizer.bos_id
    model, _ = agree.all_succeed(lambda: load_model_folder(folder, parallel, dtype=_dtype(request)))
    model.eval().requires_grad_(False)
    with _Progress("perplexity") as progress:
        tally = score_documents(
            model,
            documents,
            length=length,
            stride=request.stride,
            prefix=prefix,
            batch_size=request.batch_size,
            on_batch=progress.update,
        )
    facts: dict[str, object] = {
        "dataset_path": list(request.data),
        "output_type": "loglikelihood_rolling",
        "max_length": length,
        "stride": request.stride or length,
        "prefix_token_id": prefix,
    }
    return perplexity_result(tally, documents, name="perplexity", config=facts)


def _labelled(name: str, request: EvaluateRequest, folder: Path, parallel: ParallelContext) -> TaskResult:
    with _Progress(name.replace("_", " ")) as progress:
        return evaluate_task(
            name,
            request,
            folder,
            parallel,
            dtype=_dtype(request),
            output=_output_folder(request),
            on_batch=progress.update,
        )


def _context_length(request: EvaluateRequest, section: ModelSection) -> int:
    length = request.max_length or section.seq_length
    if length > section.seq_length and section.position == "learned":
        raise UsageError(
            f"the model has learned {section.seq_length} positions; a context of {length} is beyond it",
            hint=f"use at most {section.seq_length}",
        )
    return length


def _dtype(request: EvaluateRequest) -> torch.dtype:
    """``auto`` is float32: a score is to be the same on every machine."""
    return torch.bfloat16 if request.precision == "bf16" else torch.float32


def _config(request: EvaluateRequest, folder: Path, parallel: ParallelContext) -> dict[str, Any]:
    """How the model was run. Under the harness's names where it has them."""
    dtype = str(_dtype(request)).removeprefix("torch.")
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
    return run_folder / "evaluate" if (run_folder / "latest").is_file() else None


class _Progress:
    """A bar on a terminal, a line every ten seconds elsewhere; only on the rank that talks."""

    def __init__(self, what: str) -> None:
        self.what, self._bar, self._task = what, None, None
        self._begin = self._said = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int) -> None:
        now = time.monotonic()
        if log.is_quiet() or not log.is_talker() or now - self._begin < 1.0:
            return
        if not sys.stderr.isatty():
            if now - self._said >= 10.0:
                self._said = now
                left = (now - self._begin) / done * (total - done)
                log.info(f"{self.what}: {done:,} of {total:,}, {left:,.0f} s left")
            return
        if self._bar is None:
            from rich.progress import Progress

            self._bar = Progress(console=log.console(), transient=True)
            self._task = self._bar.add_task(self.what, total=total)
            self._bar.start()
        self._bar.update(self._task, completed=done)
