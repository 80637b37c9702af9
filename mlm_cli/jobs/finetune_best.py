"""Keeping the best checkpoint of a fine-tuning run: a pointer in the run folder, and what there is to beat."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mlm_cli import log
from mlm_cli.checkpoint import agree
from mlm_cli.checkpoint.manifest import read_manifest
from mlm_cli.checkpoint.save import Checkpointer
from mlm_cli.checkpoint.state import Position
from mlm_cli.errors import CheckpointError
from mlm_cli.training.session import Session


class Best:
    """The best evaluation of the run so far. Higher is better; of equals the first stays."""

    def __init__(self, metric: str, step_of_best: Callable[[], int | None], score: float | None) -> None:
        self.metric, self._step, self.score = metric, step_of_best, score

    def beaten_by(self, values: Mapping[str, float]) -> bool:
        return self.metric in values and (self.score is None or values[self.metric] > self.score)

    def describe(self) -> str:
        return "" if self.score is None else f"; best {self.metric} {self.score:.4f} at step {self._step():,}"


class BestCheckpointer(Checkpointer):
    """Points the run folder's ``best`` at a checkpoint, once it is whole, whose evaluation beats all earlier ones."""

    best: Best

    def committed(self, position: Position, metrics: dict[str, float]) -> None:
        if self.best.beaten_by(metrics):
            agree.on_rank_zero(lambda: self.run.set_best(position.step))
            self.best.score = metrics[self.best.metric]


def score_of_best(session: Session, name: str) -> float | None:
    """The score ``name`` to beat when a run goes on: that in the manifest of its best checkpoint."""

    def read() -> float | None:
        step = session.run.best()
        if step is None or session.found is None:
            return None
        try:
            return read_manifest(session.run.checkpoint(step)).metrics.get(name)
        except CheckpointError as error:
            log.warn(f"the best checkpoint so far is damaged and counts no more: {error.message}")
            return None

    return agree.on_rank_zero(read)
