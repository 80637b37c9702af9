"""Embedding: texts as vectors whose cosine says how alike they are.

Trained with pairs: the cosine is to be the pair's score (Reimers and Gurevych 2019, section 3), or the second text of a
pair is to be nearer to the first than those of all other pairs of the micro-batch (Henderson et al. 2017, section 4;
van den Oord et al. 2018): there larger micro-batches teach more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mlm_cli.config.schema import ModelSection, TaskSection
from mlm_cli.errors import DataError
from mlm_cli.models.heads import HeadSpec
from mlm_cli.tasks.correlation import correlations
from mlm_cli.tasks.features import Features
from mlm_cli.tasks.labelled_text import Example, columns_of, number_of, read_examples
from mlm_cli.tasks.task import Batch, HeadTask, Scores


class Embedding(HeadTask):
    """Spearman's and Pearson's correlation of the cosine with the scores."""

    name: ClassVar[str] = "embedding"
    kept: ClassVar[tuple[str, ...]] = ("pooling",)

    @staticmethod
    def architecture(model: ModelSection) -> str:
        return "Model"

    @staticmethod
    def read(path: str, section: TaskSection) -> list[Example]:
        examples = read_examples(path, columns_of(section))
        if section.text_pair_column is None:
            raise DataError(
                f"{path}: embeddings are learned from and measured on pairs", hint="set task.text_pair_column"
            )
        return examples

    def features(self, examples: Sequence[Example], *, training: bool = False) -> Features:
        """Scores are divided by ``task.max_score``. Contrastive training is on pairs from ``task.min_positive`` on.

        Raises:
            DataError: a score that is no number, or beyond ``task.max_score``; naming file and line.
        """
        labels = self._labels(examples).astype(np.float32)
        for example, label in zip(examples, labels, strict=True):
            if not -1.0 <= label <= 1.0:
                raise DataError(
                    f"{example.where}: score {example.label} is beyond task.max_score {self.section.max_score:g}",
                    hint="set task.max_score to the score of equal texts",
                )
        chosen = np.arange(len(examples))
        if training and self.section.loss == "contrastive":
            chosen = np.flatnonzero(labels >= self.section.min_positive)
        texts = [text for number in chosen for text in (examples[number].text, examples[number].text_pair or "")]
        return Features(
            tuple(self.encoder.rows(texts)),
            self.encoder.pad_id,
            {"labels": labels[chosen]},
            starts=np.arange(0, 2 * len(chosen) + 1, 2, dtype=np.int64),
        )

    @property
    def head(self) -> HeadSpec:
        return HeadSpec("embedding", pooling=self.section.pooling)

    def loss(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        first, second = outputs[0::2], outputs[1::2]
        if self.section.loss == "cosine":
            return F.mse_loss((first * second).sum(-1), batch["labels"]), torch.tensor(len(first))
        positive = batch["labels"] >= self.section.min_positive
        scores = first @ second.t() / self.section.temperature
        each = F.cross_entropy(scores, torch.arange(len(first), device=scores.device), reduction="none")
        count = positive.sum()
        return (each * positive).sum() / count.clamp(min=1), count

    def predict(self, outputs: Tensor, batch: Batch) -> list[float]:
        """The cosine of each pair."""
        found: list[float] = (outputs[0::2] * outputs[1::2]).sum(-1).tolist()
        return found

    def score(self, answers: Sequence[float], examples: Sequence[Example], *, seed: int) -> Scores:
        metrics, errors = correlations(np.array(answers), self._labels(examples), seed=seed)
        return Scores(metrics, errors, {"mean_cosine": float(np.mean(answers))})

    def loss_of(self, answers: Sequence[float], examples: Sequence[Example]) -> float:
        """Of the cosine loss; a contrastive one is not in the cosines alone."""
        if self.section.loss != "cosine":
            return super().loss_of(answers, examples)
        return float(np.mean((np.array(answers) - self._labels(examples)) ** 2))

    def _labels(self, examples: Sequence[Example]) -> np.ndarray:
        return np.array([number_of(example) / self.section.max_score for example in examples], dtype=np.float64)
