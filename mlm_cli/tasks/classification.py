"""Text classification: one class for a text, or for a pair of texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mlm_cli.config.schema import ModelSection, TaskSection
from mlm_cli.errors import DataError
from mlm_cli.models.heads import HeadSpec
from mlm_cli.tasks.features import Features
from mlm_cli.tasks.labelled_text import Example, columns_of, read_examples
from mlm_cli.tasks.task import Batch, HeadTask, Scores


class Classification(HeadTask):
    """Cross entropy over the classes; accuracy and F1."""

    name: ClassVar[str] = "classification"
    has_labels: ClassVar[bool] = True

    @staticmethod
    def architecture(model: ModelSection) -> str:
        return "ForSequenceClassification"

    @staticmethod
    def read(path: str, section: TaskSection) -> list[Example]:
        return read_examples(path, columns_of(section))

    @staticmethod
    def find_labels(examples: Sequence[Example], section: TaskSection) -> tuple[str, ...]:
        return label_names(examples, section.labels)

    def features(self, examples: Sequence[Example], *, training: bool = False) -> Features:
        """Raises DataError at a label that is not among the task's, naming file and line."""
        for example in examples:
            if example.label not in self.labels:
                raise DataError(
                    f"{example.where}: label `{example.label}` is not one of "
                    f"{', '.join(f'`{name}`' for name in self.labels)}",
                    hint="name all labels in task.labels, or mend the file",
                )
        return Features(rows_of(self, examples), self.encoder.pad_id, {"labels": self._truth(examples)})

    @property
    def head(self) -> HeadSpec:
        return HeadSpec("sequence", len(self.labels))

    def loss(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return F.cross_entropy(outputs, batch["labels"]), torch.tensor(len(outputs))

    def predict(self, outputs: Tensor, batch: Batch) -> list[np.ndarray]:
        """Probabilities of the classes, float64 [labels]."""
        return list(outputs.double().softmax(-1).cpu().numpy())

    def reordered(self, answers: Sequence[np.ndarray], order: Sequence[int]) -> list[np.ndarray]:
        return [probabilities[list(order)] for probabilities in answers]

    def _truth(self, examples: Sequence[Example]) -> np.ndarray:
        numbers = {name: number for number, name in enumerate(self.labels)}
        return np.array([numbers[example.label] for example in examples], dtype=np.int64)

    def loss_of(self, answers: Sequence[np.ndarray], examples: Sequence[Example]) -> float:
        return negative_log(probabilities[label] for probabilities, label in zip(answers, self._truth(examples)))

    def score(self, answers: Sequence[np.ndarray], examples: Sequence[Example], *, seed: int) -> Scores:
        """The error of F1 is by bootstrap, that of the accuracy exact."""
        predicted = np.array([probabilities.argmax() for probabilities in answers])
        confusion = confusion_matrix(predicted, self._truth(examples), len(self.labels))
        most_common = int(confusion.sum(1).argmax())
        facts = {
            "labels": list(self.labels),
            "f1": f"of the class `{self.labels[1]}`" if len(self.labels) == 2 else "macro",
            "confusion": {"rows": "label", "columns": "prediction", "counts": confusion.tolist()},
            "majority_baseline": {
                "label": self.labels[most_common],
                "accuracy": confusion.sum(1).max() / confusion.sum(),
            },
        }
        metrics = {name: float(value) for name, value in scores(confusion).items()}
        return Scores(metrics, standard_errors(confusion, seed=seed), facts)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "problem_type": "single_label_classification"}


def negative_log(probabilities: Iterable[float]) -> float:
    """Mean cross entropy, from the probabilities of what was right."""
    right = np.maximum(np.fromiter(probabilities, dtype=np.float64), np.finfo(np.float64).tiny)
    return float(-np.log(right).mean())


def rows_of(task: HeadTask, examples: Sequence[Example]) -> tuple[Any, ...]:
    """A row for each text, or each pair of texts."""
    paired = any(example.text_pair is not None for example in examples)
    pairs = [example.text_pair or "" for example in examples] if paired else None
    return tuple(task.encoder.rows([example.text for example in examples], pairs))


def label_names(examples: Sequence[Example], given: Sequence[str] | None = None) -> tuple[str, ...]:
    """Names of the classes, in the order of their numbers: as given, else those that occur, sorted (numbers by value).

    Raises:
        DataError: fewer than two.
    """
    if given is not None:
        names = tuple(given)
    else:
        found = {example.label for example in examples}
        numeric = all(label.lstrip("-").isdigit() for label in found)
        names = tuple(sorted(found, key=(lambda label: (int(label), label)) if numeric else None))
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise DataError(
            f"classification needs two or more distinct labels, not {list(names)} (read from {examples[0].where} on)",
            hint="check task.label_column, or name the labels in task.labels",
        )
    return names


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, num_labels: int) -> np.ndarray:
    """Counts int64 [label, prediction]."""
    return np.bincount(labels * num_labels + predicted, minlength=num_labels**2).reshape(num_labels, num_labels)


def scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """``accuracy`` and ``f1`` of confusion matrices [..., labels, labels], each [...].

    F1 of two classes is that of the second (the positive one); of more, the mean over the classes (macro). A class that
    neither occurs nor is predicted counts 0, as in scikit-learn with ``zero_division=0``.
    """
    right = np.diagonal(confusion, axis1=-2, axis2=-1).astype(float)
    either = confusion.sum(-1) + confusion.sum(-2)
    f1 = np.divide(2 * right, either, out=np.zeros_like(right), where=either > 0)
    total = confusion.sum((-2, -1))
    return {"accuracy": right.sum(-1) / total, "f1": f1[..., 1] if f1.shape[-1] == 2 else f1.mean(-1)}


def standard_errors(confusion: np.ndarray, *, seed: int, draws: int = 1000) -> dict[str, float | None]:
    """Standard error of each score: exact for the accuracy (a mean), by bootstrap over the examples for F1.

    Drawing examples with replacement is drawing a multinomial confusion matrix.
    """
    total = int(confusion.sum())
    if total < 2:
        return {"accuracy": None, "f1": None}
    accuracy = float(scores(confusion)["accuracy"])
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(total, (confusion / total).ravel(), size=draws).reshape(draws, *confusion.shape)
    return {
        "accuracy": (accuracy * (1 - accuracy) / (total - 1)) ** 0.5,
        "f1": float(np.std(scores(drawn)["f1"], ddof=1)),
    }


def score_predictions(predicted: np.ndarray, labels: np.ndarray, num_labels: int) -> Mapping[str, float]:
    """``accuracy`` and ``f1`` of predicted class numbers."""
    found = scores(confusion_matrix(predicted, labels, num_labels))
    return {name: float(value) for name, value in found.items()}
