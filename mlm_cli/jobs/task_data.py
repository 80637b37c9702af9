"""A task with its files, as ``mlm finetune`` and ``mlm evaluate`` take it from a recipe's ``task`` section."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from mlm_cli.config.schema import ModelSection, TaskSection
from mlm_cli.data.tokenizer import Tokenizer
from mlm_cli.errors import DataError, UsageError
from mlm_cli.tasks.encoding import TextEncoder
from mlm_cli.tasks.features import Features
from mlm_cli.tasks.registry import TASKS
from mlm_cli.tasks.task import Task


@dataclass(frozen=True)
class TaskData:
    """A task as numbers: units of both files, the examples that dev's were made of, what identifies the data."""

    task: Task
    train: Features
    dev: Features
    dev_examples: Sequence[Any]
    fingerprint: str


def check_max_length(section: TaskSection, context: int) -> None:
    """Raise UsageError where texts longer than the model's context are asked for."""
    if section.max_length is not None and section.max_length > context:
        raise UsageError(
            f"task.max_length {section.max_length} is beyond the model's context of {context} tokens",
            hint=f"use task.max_length={context} or less",
        )


def read_task(section: TaskSection, tokenizer: Tokenizer, model: ModelSection) -> TaskData:
    """Read, check and encode both files of a task.

    Raises:
        DataError: naming file and line.
        UsageError: texts longer than the model's context are asked for.
    """
    check_max_length(section, model.seq_length)
    kind = TASKS[section.name]
    examples, held_out = kind.read(section.train, section), kind.read(section.dev, section)
    encoder = TextEncoder(tokenizer, model, section.max_length or model.seq_length)
    task = kind(section, encoder, kind.find_labels(examples, section))
    train, dev = task.features(examples, training=True), task.features(held_out)
    if not len(train):
        raise DataError(f"{section.train} holds nothing that {section.name} can be learned from")
    digest = sha256(f"{tokenizer.fingerprint} {section.name} {task.labels} {encoder.max_length}".encode())
    digest.update(train.digest())
    return TaskData(task, train, dev, held_out, digest.hexdigest())
