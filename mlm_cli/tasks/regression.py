"""Regression: one number for a text or a pair of texts, such as the similarity of two sentences (STS-B)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mlm_cli.config.schema import ModelSection, TaskSection
from mlm_cli.models.heads import HeadSpec
from mlm_cli.tasks.classification import rows_of
from mlm_cli.tasks.correlation import correlations
from mlm_cli.tasks.features import Features
from mlm_cli.tasks.labelled_text import Example, columns_of, number_of, read_examples
from mlm_cli.tasks.task import Batch, HeadTask, Scores


class Regression(HeadTask):
    """Squared error; Pearson's and Spearman's correlation with the labels (GLUE, Wang et al. 2019, section 3.2)."""

    name: ClassVar[str] = "regression"

    @staticmethod
    def architecture(model: ModelSection) -> str:
        return "ForSequenceClassification"

    @staticmethod
    def read(path: str, section: TaskSection) -> list[Example]:
        return read_examples(path, columns_of(section))

    def features(self, examples: Sequence[Example], *, training: bool = False) -> Features:
        """Raises DataError at a label that is no number, naming file and line."""
        labels = _labels(examples).astype(np.float32)
        return Features(rows_of(self, examples), self.encoder.pad_id, {"labels": labels})

    @property
    def head(self) -> HeadSpec:
        return HeadSpec("sequence", 1)

    def loss(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return F.mse_loss(outputs[:, 0], batch["labels"]), torch.tensor(len(outputs))

    def predict(self, outputs: Tensor, batch: Batch) -> list[float]:
        found: list[float] = outputs[:, 0].tolist()
        return found

    def score(self, answers: Sequence[float], examples: Sequence[Example], *, seed: int) -> Scores:
        labels = _labels(examples)
        metrics, errors = correlations(np.array(answers), labels, seed=seed)
        return Scores(metrics, errors, {"label_mean": float(labels.mean()), "label_variance": float(labels.var())})

    def loss_of(self, answers: Sequence[float], examples: Sequence[Example]) -> float:
        return float(np.mean((np.array(answers) - _labels(examples)) ** 2))

    def config(self) -> dict[str, Any]:
        return {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": "regression"}


def _labels(examples: Sequence[Example]) -> np.ndarray:
    return np.array([number_of(example) for example in examples], dtype=np.float64)
