"""What a kind of task is: how its files become units and targets, the head it puts on a model, its loss and its scores.

``mlm finetune`` and ``mlm evaluate`` know no more of a task than this.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from mlm_cli.config.schema import ModelSection, TaskSection
from mlm_cli.models.heads import HeadSpec, reads_first_token
from mlm_cli.tasks.encoding import TextEncoder
from mlm_cli.tasks.features import Features

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Scores:
    """What predictions are worth.

    Attributes:
        metrics: more is better in each.
        stderr: standard errors, None where not known.
        facts: what else a reader of ``results.json`` wants to know.
        predictions: by file name, what was predicted, in the form that the field's own scorers read.
    """

    metrics: Mapping[str, float]
    stderr: Mapping[str, float | None] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    predictions: Mapping[str, str] = field(default_factory=dict)


class Task(ABC):
    """One kind of task with its settings.

    Args:
        section: columns and settings.
        encoder: makes rows for the model.
        labels: names of the classes in the order of their numbers; empty where there are none.

    Attributes:
        name: as ``task.name`` in a recipe.
        has_labels: it chooses between classes with names.
        kept: keys of the section that the model cannot be used rightly without: they travel with it.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    kept: ClassVar[tuple[str, ...]] = ()
    has_labels: ClassVar[bool] = False

    def __init__(self, section: TaskSection, encoder: TextEncoder, labels: Sequence[str] = ()) -> None:
        self.section, self.encoder, self.labels = section, encoder, tuple(labels)

    @staticmethod
    def check_family(model: ModelSection) -> None:
        """Raise UsageError unless a model of this family can learn the task."""
        reads_first_token(model)

    @staticmethod
    @abstractmethod
    def architecture(model: ModelSection) -> str:
        """End of the name of transformers' class that holds the model with this task's head."""

    @staticmethod
    @abstractmethod
    def read(path: str, section: TaskSection) -> list[Any]:
        """The examples of a file. Raises DataError naming file and line."""

    @staticmethod
    def find_labels(examples: Sequence[Any], section: TaskSection) -> tuple[str, ...]:
        """Names of the classes, from the training file unless ``section`` names them."""
        return ()

    @abstractmethod
    def features(self, examples: Sequence[Any], *, training: bool = False) -> Features:
        """Examples as numbers. ``training``: those that cannot be learned from may be left out."""

    @property
    @abstractmethod
    def head(self) -> HeadSpec:
        """What is put on the model."""

    @abstractmethod
    def loss(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mean loss (float32, with gradient) of the model's outputs, and the number of targets it is over."""

    def answers(self, predictions: Sequence[Any], features: Features, examples: Sequence[Any]) -> list[Any]:
        """What the model says of each example; probabilities, not a choice, so that they can be pooled.

        Args:
            predictions: one for each unit of ``features``.
        """
        return list(predictions)

    def pool(self, members: Sequence[Sequence[Any]]) -> list[Any]:
        """The answers of several models to the same examples as one: their means (Stone 1961, linear opinion pool)."""
        return [np.mean(answers, axis=0) for answers in zip(*members, strict=True)]

    @staticmethod
    def check_together(sections: Mapping[str, TaskSection]) -> None:
        """Can models with these settings, by name, be pooled? Raises UsageError."""
        return

    def reordered(self, answers: Sequence[Any], order: Sequence[int]) -> list[Any]:
        """``answers`` with the classes in another order: ``order[i]`` is where class ``i`` stood."""
        return list(answers)

    @abstractmethod
    def score(self, answers: Sequence[Any], examples: Sequence[Any], *, seed: int) -> Scores:
        """What the answers, one for each example, are worth. ``seed``: of a bootstrap."""

    def loss_of(self, answers: Sequence[Any], examples: Sequence[Any]) -> float:
        """The loss of answers; nan where they do not say enough for it."""
        return math.nan

    def count_tokens(self, batch: Batch) -> Tensor:
        """Tokens of a batch that the model reads: what progress is told in."""
        return batch["lengths"].sum()

    def config(self) -> dict[str, Any]:
        """Entries of the model's ``config.json`` that say what the head's outputs mean, as transformers names them."""
        if not self.labels:
            return {}
        return {
            "num_labels": len(self.labels),
            "id2label": {str(number): label for number, label in enumerate(self.labels)},
            "label2id": {label: number for number, label in enumerate(self.labels)},
        }


class HeadTask(Task):
    """A kind whose answers come from a head of its own, one pass over a batch for each."""

    @abstractmethod
    def predict(self, outputs: Tensor, batch: Batch) -> list[Any]:
        """What the model says of each unit of the batch, as plain values or numpy arrays: see ``answers``."""
