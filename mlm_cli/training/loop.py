"""The training loop. Everything swappable is built before it starts; it knows no task, no layout and no file format."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mlm_cli.checkpoint.save import Checkpointer
from mlm_cli.checkpoint.state import Position
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.training.agreement import agree_on_step, bad_gradient, bad_loss
from mlm_cli.training.engine import Batch, Engine, Objective
from mlm_cli.training.monitor import Monitor
from mlm_cli.training.stop import StopFlag

# evaluator(model) -> values for the step's record, equal on all ranks, such as {"valid_loss": 2.5}
Evaluator = Callable[[Any], dict[str, float]]


@dataclass(frozen=True)
class Plan:
    """How long to train, and when to do what. ``every``: 0 means only at the end (checkpoints) or never (evaluation).

    Attributes:
        steps: updates of the whole run, counted from its very beginning.
        accumulation: micro-batches of one update on this rank.
        global_batch_size: samples of one update over all ranks.
        batch_at: consumed samples -> samples of the next update, where batches grow; ``accumulation`` is that of whole
            ones.
        checkpoint_when: given an evaluation's values, also save now? For keeping the best of a fine-tuning run.
    """

    steps: int
    accumulation: int
    global_batch_size: int
    checkpoint_every: int = 0
    evaluate_every: int = 0
    checkpoint_when: Callable[[int, dict[str, float]], bool] | None = None
    batch_at: Callable[[int], int] | None = None

    def batch(self, consumed_samples: int) -> tuple[int, int]:
        """(samples, micro-batches of this rank) of the update after ``consumed_samples``."""
        samples = self.global_batch_size if self.batch_at is None else self.batch_at(consumed_samples)
        return samples, samples * self.accumulation // self.global_batch_size


def train(
    plan: Plan,
    engine: Engine,
    batches: Iterator[Batch],
    objective: Objective,
    schedule: Callable[[int], float],
    *,
    start: Position,
    parallel: ParallelContext,
    evaluator: Evaluator | None,
    checkpointer: Checkpointer,
    monitor: Monitor,
    stop: StopFlag,
) -> tuple[Position, signal.Signals | None]:
    """Train from ``start`` to ``plan.steps`` or a stop signal; the last position is always saved.

    Returns where training stands, and the signal that stopped it (None: it is finished). Raises ``NumericsError`` when
    a loss or gradient is not finite: the weights are those before the step.
    """
    position, tokens = start, int(start.extra.get("tokens", 0))
    for step in range(start.step + 1, plan.steps + 1):
        monitor.begin_step()

        # the micro-batches of this rank
        with monitor.waiting_for_data():
            samples, accumulation = plan.batch(position.consumed_samples)
            micro_batches = [_to_device(next(batches), parallel) for _ in range(accumulation)]

        # forward and backward of each; gradients add up in the engine
        outcomes = engine.accumulate(objective, micro_batches)

        # every rank learns the mean loss, and whether anyone saw a NaN or a signal (host sync)
        report = agree_on_step(outcomes, stop, parallel)
        if not report.finite:
            raise bad_loss(step, outcomes, micro_batches, parallel)

        # the update: clip, AdamW; a norm that is not finite leaves the weights alone (host sync)
        grad_norm = engine.step(lr := schedule(step))
        if not math.isfinite(grad_norm):
            raise bad_gradient(step, grad_norm, micro_batches)

        tokens += report.tokens
        position = position.after(step, samples, tokens=tokens)
        monitor.end_step(report.tokens)

        # validation
        last = step == plan.steps or report.stop is not None
        values: dict[str, float] = {}
        if evaluator is not None and _due(step, plan.evaluate_every, step == plan.steps) and report.stop is None:
            values = evaluator(engine.model)
        record = {"loss": report.loss, "grad_norm": grad_norm, "lr": lr, "tokens": tokens, **values}
        monitor.record(step, record, force=bool(values) or last)

        # checkpoint
        wanted = plan.checkpoint_when is not None and bool(values) and plan.checkpoint_when(step, values)
        if last or wanted or _due(step, plan.checkpoint_every, False):
            monitor.saved(step, checkpointer.save(position, {"loss": report.loss, **values}))
        if report.stop is not None:
            return position, report.stop
    return position, None


def _due(step: int, every: int, at_end: bool) -> bool:
    return every > 0 and (step % every == 0 or at_end)


def _to_device(batch: Batch, parallel: ParallelContext) -> Batch:
    return {name: tensor.to(parallel.device, non_blocking=True) for name, tensor in batch.items()}
