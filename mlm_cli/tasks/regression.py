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
from mlm_cli.tasks.task import Batch, Scores, Task


class Regression(Task):
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
        labels = np.array([number_of(example) for example in examples], dtype=np.float32)
        return Features(rows_of(self, examples), self.encoder.pad_id, {"labels": labels})

    @property
    def head(self) -> HeadSpec:
        return HeadSpec("sequence", 1)

    def loss(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return F.mse_loss(outputs[:, 0], batch["labels"]), torch.tensor(len(outputs))

    def predict(self, outputs: Tensor, batch: Batch) -> list[float]:
        found: list[float] = outputs[:, 0].tolist()
        return found

    def score(
        self, predictions: Sequence[float], features: Features, examples: Sequence[Example], *, seed: int
    ) -> Scores:
        labels = features.targets["labels"]
        metrics, errors = correlations(np.array(predictions), labels, seed=seed)
        facts = {"label_mean": float(labels.mean()), "label_variance": float(labels.astype(np.float64).var())}
        return Scores(metrics, errors, facts)

    def average(self, outputs: Sequence[Tensor], batch: Batch) -> Tensor:
        """The mean of several models' numbers."""
        return torch.stack(list(outputs)).mean(0)

    def config(self) -> dict[str, Any]:
        return {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": "regression"}
