"""Predictions of a classifier on labelled examples and their scores, for ``mlm finetune`` and ``mlm evaluate``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from mlm_cli import heartbeat
from mlm_cli.evaluation.results import TaskResult
from mlm_cli.tasks.classification import Features, confusion_matrix, evaluation_batches, scores, standard_errors

if TYPE_CHECKING:
    import numpy as np

    from mlm_cli.parallel.context import ParallelContext

VERSION = 1


class ClassificationEvaluator:
    """``evaluator(model)`` -> ``{"dev_accuracy", "dev_f1", "dev_loss"}``, equal on all ranks.

    Args:
        features: the examples; data ranks share them.
        pad_id: fills up short texts.
        batch_size: examples at once on one rank; changes no score beyond float rounding.
    """

    def __init__(
        self, features: Features, parallel: ParallelContext, *, num_labels: int, pad_id: int, batch_size: int
    ) -> None:
        self.features, self.parallel, self.num_labels = features, parallel, num_labels
        self.pad_id, self.batch_size = pad_id, batch_size

    def __call__(self, model: Any) -> dict[str, float]:
        confusion, loss = self.count(model)
        values = {f"dev_{name}": float(value) for name, value in scores(confusion).items()}
        return {**values, "dev_loss": loss}

    @torch.no_grad()
    def count(self, model: Any, on_batch: Callable[[int, int], None] | None = None) -> tuple[np.ndarray, float]:
        """(confusion matrix int64 [label, prediction], mean cross entropy) over all examples. All ranks call.

        Args:
            on_batch: told (examples done, examples in all) of this rank.
        """
        was_training = model.training
        model.eval()
        device, data = self.parallel.device, self.parallel.data
        # Counts and the summed loss travel together; float64 holds both exactly enough.
        total = torch.zeros(self.num_labels**2 + 1, dtype=torch.float64, device=device)
        done, mine = 0, -(-len(self.features) // data.size)
        for batch in evaluation_batches(
            self.features, pad_id=self.pad_id, batch_size=self.batch_size, data_rank=data.rank, data_size=data.size
        ):
            labels = batch["labels"].to(device)
            logits = model(batch["tokens"].to(device), batch["lengths"].to(device))
            predicted = logits.argmax(-1).cpu().numpy()
            counts = confusion_matrix(predicted, batch["labels"].numpy(), self.num_labels)
            total[:-1] += torch.from_numpy(counts.ravel()).to(device)
            total[-1] += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").double()
            done += len(labels)
            heartbeat.beat()
            if on_batch is not None:
                on_batch(done, mine)
        model.train(was_training)
        summed = data.all_reduce_(total).cpu().numpy()
        confusion = summed[:-1].round().astype("int64").reshape(self.num_labels, self.num_labels)
        return confusion, float(summed[-1]) / len(self.features)


def classification_result(
    confusion: np.ndarray,
    loss: float,
    labels: tuple[str, ...],
    *,
    seed: int,
    config: dict[str, object],
    num_original: int,
) -> TaskResult:
    """The task's entry of ``results.json``. The error of F1 is by bootstrap, that of the accuracy exact."""
    metrics = {name: float(value) for name, value in scores(confusion).items()}
    most_common = int(confusion.sum(1).argmax())
    facts = {
        "labels": list(labels),
        "f1": f"of the class `{labels[1]}`" if len(labels) == 2 else "macro",
        "confusion": {"rows": "label", "columns": "prediction", "counts": confusion.tolist()},
        "majority_baseline": {"label": labels[most_common], "accuracy": confusion.sum(1).max() / confusion.sum()},
    }
    return TaskResult(
        name="classification",
        metrics={**metrics, "loss": loss},
        stderr=standard_errors(confusion, seed=seed),
        higher_is_better={"accuracy": True, "f1": True, "loss": False},
        config={**config, **facts},
        version=VERSION,
        num_samples=int(confusion.sum()),
        num_original=num_original,
    )
