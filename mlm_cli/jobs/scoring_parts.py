"""What the parts of ``mlm evaluate`` share: tokenizer, context, precision, and the bar of progress."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mlm_cli import log
from mlm_cli.checkpoint.hub import check_vocabulary, read_model_config, task_class, trained_task
from mlm_cli.config.requests import EvaluateRequest
from mlm_cli.config.tasks import WRITTEN_KINDS
from mlm_cli.data.tokenizer import Tokenizer, load_tokenizer
from mlm_cli.errors import UsageError

if TYPE_CHECKING:
    from mlm_cli.config.schema import ModelSection


def untuned_section(folder: Path, name: str) -> ModelSection:
    """The model section of a model that predicts words.

    Raises:
        UsageError: ``name`` was fine-tuned to a task of another kind.
    """
    section, config = read_model_config(folder)
    task = trained_task(config)
    if task not in (None, *WRITTEN_KINDS) or task_class(config) is not None:
        task = task or "classification"
        raise UsageError(f"{name} was fine-tuned to a task: it predicts no text", hint=f"use --task {task}")
    return section


def language_model_section(folder: Path, name: str) -> ModelSection:
    """The model section of a model that predicts text from left to right.

    Raises:
        UsageError: ``name`` was fine-tuned to a task, or does not read from left to right.
    """
    section = untuned_section(folder, name)
    if section.family != "gpt":
        what = {"bert": "a masked language model", "t5": "an encoder-decoder"}[section.family]
        raise UsageError(
            f"{name} is {what}: it has no probability of a text from left to right",
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
