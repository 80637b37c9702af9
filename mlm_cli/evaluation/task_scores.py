"""Predictions of a task's model on labelled examples and their scores, for ``mlm finetune`` and ``mlm evaluate``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mlm_cli import heartbeat
from mlm_cli.evaluation.results import TaskResult
from mlm_cli.evaluation.written_texts import gather_units, write_texts
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.tasks.batches import evaluation_batches
from mlm_cli.tasks.features import Features
from mlm_cli.tasks.task import HeadTask, Scores, Task
from mlm_cli.tasks.writing import Writing


class TaskEvaluator:
    """``evaluator(model)`` -> ``{"dev_accuracy", ..., "dev_loss"}``, equal on all ranks.

    Args:
        examples: what the features were made of.
        features: the units; data ranks share them.
        batch_size: units at once on one rank; changes no score beyond float rounding.
        interrupt: called by all ranks before every round; may raise to leave the evaluation.
    """

    def __init__(
        self,
        task: Task,
        examples: Sequence[Any],
        features: Features,
        parallel: ParallelContext,
        *,
        batch_size: int,
        seed: int = 1234,
        interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        self.interrupt = interrupt
        self.task, self.examples, self.features, self.parallel = task, examples, features, parallel
        self.batch_size, self.seed = batch_size, seed

    def __call__(self, model: Any) -> dict[str, float]:
        was_training = model.training
        model.eval()
        try:
            answers, loss = self.answers(model)
        finally:
            model.train(was_training)
        scores = self.task.score(answers, self.examples, seed=self.seed)
        return {**{f"dev_{name}": value for name, value in scores.metrics.items()}, "dev_loss": loss}

    @torch.no_grad()
    def answers(self, model: Any, on_batch: Callable[[int, int], None] | None = None) -> tuple[list[Any], float]:
        """(what the model says of each example, mean loss over all units), equal on all ranks. All ranks call.

        Args:
            model: a TaskModel, or one under an engine, in evaluation mode.
            on_batch: told (units done, units in all) of this rank; where texts are written, they count apart.
        """
        device, data, task = self.parallel.device, self.parallel.data, self.task
        total = torch.zeros(2, dtype=torch.float64, device=device)
        done, mine = 0, -(-len(self.features) // data.size) * (2 if isinstance(task, Writing) else 1)
        predicted: dict[int, Any] = {}

        def count(units: int) -> None:
            nonlocal done
            done += units
            heartbeat.beat()
            if on_batch is not None:
                on_batch(min(done, mine), mine)

        batches = evaluation_batches(
            self.features, batch_size=self.batch_size, data_rank=data.rank, data_size=data.size
        )
        for _ in range(0, len(self.features), self.batch_size * data.size):  # as many rounds on every rank
            self.interrupt()
            batch = next(batches, None)
            if batch is None:
                continue
            here = {name: tensor.to(device) for name, tensor in batch.items()}
            outputs = model(here)
            loss, targets = task.loss(outputs, here)
            total += torch.stack([loss.double() * targets, targets.double()]).to(device)
            if isinstance(task, HeadTask):
                predicted.update(zip(batch["sample_ids"].tolist(), task.predict(outputs, here), strict=True))
            count(len(batch["sample_ids"]))
        if isinstance(task, Writing):
            predicted = write_texts(
                model.backbone,
                task,
                self.features,
                batch_size=self.batch_size,
                on_text=lambda: count(1),
                interrupt=self.interrupt,
            )
        else:
            predicted = gather_units(predicted, data)
        summed, num_targets = data.all_reduce_(total).tolist()
        ordered = [predicted[unit] for unit in range(len(self.features))]
        return task.answers(ordered, self.features, self.examples), summed / num_targets if num_targets else math.nan


def task_result(
    task: Task, scores: Scores, loss: float, *, config: dict[str, object], num_samples: int, num_original: int
) -> TaskResult:
    """The task's entry of ``results.json``; a loss that is not known (nan) is left out."""
    return TaskResult(
        name=task.name,
        metrics=scores.metrics if math.isnan(loss) else {**scores.metrics, "loss": loss},
        stderr=scores.stderr,
        higher_is_better={**dict.fromkeys(scores.metrics, True), "loss": False},
        config={**config, **scores.facts},
        version=task.version,
        num_samples=num_samples,
        num_original=num_original,
    )
