"""The body of ``mlm evaluate``: load a model once per task, score, write ``results.json``, show a table."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mlm_cli import distributed, log
from mlm_cli.checkpoint import agree
from mlm_cli.checkpoint.hub import check_vocabulary, load_model_folder, read_model_config, resolve_model
from mlm_cli.config.requests import EVALUATION_TASKS, EvaluateRequest
from mlm_cli.data.tokenizer import Tokenizer, load_tokenizer
from mlm_cli.errors import UsageError
from mlm_cli.evaluation.classify import ClassificationEvaluator, classification_result
from mlm_cli.evaluation.documents import open_documents
from mlm_cli.evaluation.perplexity import perplexity_result, score_documents
from mlm_cli.evaluation.results import TaskResult, results_document, results_table, write_results
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.tasks.classification import columns_of, encode_examples
from mlm_cli.tasks.classifier_folder import load_classifier, read_facts
from mlm_cli.tasks.labelled_text import read_examples

if TYPE_CHECKING:
    from mlm_cli.config.schema import ModelSection, TaskSection

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
    known = {"perplexity": _perplexity, "classification": _classification}
    if name not in known:
        raise UsageError(f"unknown task `{name}`", hint=f"known tasks: {', '.join(EVALUATION_TASKS)}")
    return known[name]


def _perplexity(request: EvaluateRequest, folder: Path, parallel: ParallelContext) -> TaskResult:
    if not request.data:
        raise UsageError("perplexity needs text", hint="give files or an indexed prefix with --data")
    section, config = read_model_config(folder)
    if any("Classification" in str(name) for name in config.get("architectures", list, [])):
        raise UsageError(f"{request.model} is a classifier: it predicts no text", hint="use --task classification")
    if section.family != "gpt":
        what = {"bert": "a masked language model", "t5": "an encoder-decoder"}[section.family]
        raise UsageError(
            f"{request.model} is {what}: it gives no probability of each next word of a text",
            hint="its loss on masked words is the `valid_loss` of pretraining; perplexity is for family gpt",
        )
    tokenizer = agree.all_succeed(lambda: _tokenizer(request, folder, section))
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


def _classification(request: EvaluateRequest, folder: Path, parallel: ParallelContext) -> TaskResult:
    facts = read_facts(folder)
    section, _ = read_model_config(folder)
    task = _task_section(request, folder)
    paths = request.data or ((task.dev,) if task.dev else ())
    if not paths:
        raise UsageError("classification needs a labelled file", hint="give one with --data")
    tokenizer = agree.all_succeed(lambda: _tokenizer(request, folder, section))
    columns = columns_of(task)
    examples = agree.all_succeed(lambda: [example for path in paths for example in read_examples(path, columns)])
    chosen = examples[: request.limit]
    length = min(_context_length(request, section), facts.max_length)
    features = agree.all_succeed(lambda: encode_examples(chosen, facts.labels, tokenizer, length))
    model, _ = agree.all_succeed(lambda: load_classifier(folder, parallel, dtype=_dtype(request)))
    model.requires_grad_(False)
    evaluator = ClassificationEvaluator(
        features, parallel, num_labels=len(facts.labels), pad_id=facts.pad_id, batch_size=request.batch_size
    )
    with _Progress("classification") as progress:
        confusion, loss = evaluator.count(model, progress.update)
    config: dict[str, object] = {
        "dataset_path": list(paths),
        "output_type": "classification",
        "max_length": length,
        "text_column": task.text_column,
        "text_pair_column": task.text_pair_column,
        "label_column": task.label_column,
    }
    return classification_result(
        confusion, loss, facts.labels, seed=request.seed, config=config, num_original=len(examples)
    )


def _task_section(request: EvaluateRequest, folder: Path) -> TaskSection:
    """Columns of the data: those given by hand, else those of the run that made the model."""
    from pydantic import ValidationError

    from mlm_cli.config.resolve import resolve_recipe
    from mlm_cli.config.schema import TaskSection

    values: dict[str, Any] = {"train": "", "dev": ""}
    recipe = folder.parent.parent / "recipe.yaml"  # RUN/step-N/model
    if folder.name == "model" and recipe.is_file():
        section = resolve_recipe(str(recipe)).task
        values |= section.model_dump(exclude_unset=True) if section is not None else {}
    given = dict(request.task_keys)
    if given.keys() & {"text_column", "label_column", "text_pair_column"} and "header" not in given:
        values.pop("header", None)  # what was true of the training file says nothing about columns named anew
    try:
        return TaskSection(**{**values, **given})
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"task.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _tokenizer(request: EvaluateRequest, folder: Path, section: ModelSection) -> Tokenizer:
    tokenizer = load_tokenizer(request.tokenizer or str(folder))
    check_vocabulary(section, tokenizer, str(folder))
    return tokenizer


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
