"""What the parts of ``mlm evaluate`` share: columns, tokenizer, context, precision, and the bar of progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mlm_cli import log
from mlm_cli.checkpoint.hub import check_vocabulary, read_model_config
from mlm_cli.config.requests import EvaluateRequest
from mlm_cli.data.tokenizer import Tokenizer, load_tokenizer
from mlm_cli.errors import UsageError
from mlm_cli.tasks.classification import columns_of
from mlm_cli.tasks.labelled_text import Example, read_examples

if TYPE_CHECKING:
    from mlm_cli.config.schema import ModelSection, TaskSection


def task_section(request: EvaluateRequest, folder: Path) -> TaskSection:
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


def language_model_section(folder: Path, name: str) -> ModelSection:
    """The model section of a model that predicts text.

    Raises:
        UsageError: ``name`` is a classifier, or of a family that gives no probability of each next word.
    """
    section, config = read_model_config(folder)
    if any("Classification" in str(kind) for kind in config.get("architectures", list, [])):
        raise UsageError(f"{name} is a classifier: it predicts no text", hint="use --task classification")
    if section.family != "gpt":
        what = {"bert": "a masked language model", "t5": "an encoder-decoder"}[section.family]
        raise UsageError(
            f"{name} is {what}: it gives no probability of each next word of a text",
            hint="its loss on masked words is the `valid_loss` of pretraining; perplexity is for family gpt",
        )
    return section


def prefix_of(tokenizer: Tokenizer) -> int | None:
    """Training data has an end-of-document id before each document: it makes the first token predictable too."""
    return tokenizer.eod_id if tokenizer.eod_id is not None else tokenizer.bos_id


def perplexity_facts(request: EvaluateRequest, length: int, prefix: int | None) -> dict[str, object]:
    """How perplexity was taken, for ``results.json``."""
    return {
        "dataset_path": list(request.data),
        "output_type": "loglikelihood_rolling",
        "max_length": length,
        "stride": request.stride or length,
        "prefix_token_id": prefix,
    }


def read_labelled(request: EvaluateRequest, task: TaskSection) -> tuple[tuple[str, ...], list[Example]]:
    """(files, their examples): those of the request, else the dev file of the run that made the model.

    Raises:
        UsageError: neither names a file. DataError: a file that cannot be used.
    """
    paths = request.data or ((task.dev,) if task.dev else ())
    if not paths:
        raise UsageError("classification needs a labelled file", hint="give one with --data")
    columns = columns_of(task)
    return tuple(paths), [example for path in paths for example in read_examples(path, columns)]


def classification_facts(paths: Sequence[str], task: TaskSection, length: int) -> dict[str, object]:
    """How classification was scored, for ``results.json``."""
    return {
        "dataset_path": list(paths),
        "output_type": "classification",
        "max_length": length,
        "text_column": task.text_column,
        "text_pair_column": task.text_pair_column,
        "label_column": task.label_column,
    }


def tokenizer_of(request: EvaluateRequest, folder: Path, section: ModelSection) -> Tokenizer:
    tokenizer = load_tokenizer(request.tokenizer or str(folder))
    check_vocabulary(section, tokenizer, str(folder))
    return tokenizer


def context_length(request: EvaluateRequest, section: ModelSection) -> int:
    length = request.max_length or section.seq_length
    if length > section.seq_length and section.position == "learned":
        raise UsageError(
            f"the model has learned {section.seq_length} positions; a context of {length} is beyond it",
            hint=f"use at most {section.seq_length}",
        )
    return length


def dtype_of(request: EvaluateRequest) -> torch.dtype:
    """``auto`` is float32: a score is to be the same on every machine."""
    return torch.bfloat16 if request.precision == "bf16" else torch.float32


class Progress:
    """A bar on a terminal, a line every ten seconds elsewhere; only on the rank that talks."""

    def __init__(self, what: str) -> None:
        self.what, self._bar, self._task = what, None, None
        self._begin = self._said = time.monotonic()

    def __enter__(self) -> Progress:
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
