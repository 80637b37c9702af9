"""Multiple choice: which of several texts goes with a question (SWAG, Zellers et al. 2018).

Each choice is a sequence of its own, question and choice, and gets one score; the scores of a question's choices are
weighed against each other (Devlin et al. 2019, section 4.4). Questions may have different numbers of choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mlm_cli.config.schema import ModelSection, TaskSection
from mlm_cli.errors import DataError
from mlm_cli.models.heads import HeadSpec, reads_first_token
from mlm_cli.tasks.classification import negative_log
from mlm_cli.tasks.features import Features
from mlm_cli.tasks.labelled_text import Example, columns_of, read_examples
from mlm_cli.tasks.task import Batch, HeadTask, Scores


class MultipleChoice(HeadTask):
    """Cross entropy over the choices; accuracy. The label is a choice's number from 0, or its text."""

    name: ClassVar[str] = "multiple_choice"

    @staticmethod
    def architecture(model: ModelSection) -> str:
        """A causal model has no such class in transformers: one score a sequence is a classifier with one class."""
        return "ForMultipleChoice" if reads_first_token(model) else "ForSequenceClassification"

    @staticmethod
    def read(path: str, section: TaskSection) -> list[Example]:
        examples = read_examples(path, columns_of(section))
        for example in examples:
            if len(example.choices) < 2:
                raise DataError(
                    f"{example.where} has {len(example.choices)} choices, and two or more are needed",
                    hint="check task.choice_columns",
                )
        return examples

    def features(self, examples: Sequence[Example], *, training: bool = False) -> Features:
        """Raises DataError at a label that names no choice, naming file and line."""
        questions = [example.text for example in examples for _ in example.choices]
        begun = [f"{example.text_pair} " if example.text_pair else "" for example in examples]
        choices = [start + choice for start, example in zip(begun, examples, strict=True) for choice in example.choices]
        starts = np.cumsum([0, *(len(example.choices) for example in examples)], dtype=np.int64)
        labels = np.array([_right(example) for example in examples], dtype=np.int64)
        rows = tuple(self.encoder.rows(questions, choices))
        return Features(rows, self.encoder.pad_id, {"labels": labels}, starts=starts)

    @property
    def head(self) -> HeadSpec:
        return HeadSpec("sequence", 1)

    def loss(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return F.cross_entropy(_by_question(outputs, batch), batch["labels"]), torch.tensor(len(batch["labels"]))

    def predict(self, outputs: Tensor, batch: Batch) -> list[np.ndarray]:
        """Probabilities of each question's choices, float64 [choices]."""
        shares = _by_question(outputs, batch).double().softmax(-1).cpu().numpy()
        return [row[: int(count)] for row, count in zip(shares, (batch["members"] >= 0).sum(-1), strict=True)]

    def score(self, answers: Sequence[np.ndarray], examples: Sequence[Example], *, seed: int) -> Scores:
        right = np.array([a.argmax() == _right(example) for a, example in zip(answers, examples, strict=True)])
        accuracy, total = float(right.mean()), len(right)
        error = (accuracy * (1 - accuracy) / (total - 1)) ** 0.5 if total > 1 else None
        chance = float(np.mean([1 / len(example.choices) for example in examples]))
        return Scores({"accuracy": accuracy}, {"accuracy": error}, {"chance_baseline": {"accuracy": chance}})

    def loss_of(self, answers: Sequence[np.ndarray], examples: Sequence[Example]) -> float:
        return negative_log(shares[_right(example)] for shares, example in zip(answers, examples, strict=True))

    def config(self) -> dict[str, Any]:
        if self.encoder.marked:
            return {}
        return {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


def _right(example: Example) -> int:
    if example.label in example.choices:
        return example.choices.index(example.label)
    if example.label.isdigit() and int(example.label) < len(example.choices):
        return int(example.label)
    raise DataError(
        f"{example.where}: label `{example.label}` is neither a choice nor the number of one, "
        f"0 to {len(example.choices) - 1}",
        hint="check task.label_column and task.choice_columns",
    )


def _by_question(outputs: Tensor, batch: Batch) -> Tensor:
    """``outputs [r, 1]`` -> ``[b, most choices]``, minus infinity where a question has fewer."""
    members = batch["members"]
    return outputs[:, 0][members.clamp(min=0)].masked_fill(members < 0, float("-inf"))
