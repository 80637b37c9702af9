"""Validation loss during training: the same samples every time, whatever the layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from mlm_cli import heartbeat
from mlm_cli.parallel.context import ParallelContext


class Source(Protocol):
    """Numbered samples (``data.packed.SampleSource``)."""

    def get(self, number: int) -> Mapping[str, np.ndarray | None]: ...

    def collate(
        self, samples: Sequence[Mapping[str, np.ndarray | None]], numbers: Sequence[int]
    ) -> dict[str, np.ndarray]: ...


class Validator:
    """``validator(model)`` -> ``{"valid_loss": nats per token, ...}`` over the first ``num_samples`` of a source.

    The samples are dealt to the data ranks by micro-batch; sums and counts are added up over data ranks.
    Models give ``scores(batch) -> [names, 2]``, a sum and a count for each of their ``score_names``.

    Args:
        interrupt: called by all ranks before every round; may raise to leave the validation.
    """

    def __init__(
        self,
        source: Source,
        parallel: ParallelContext,
        *,
        num_samples: int,
        micro_batch_size: int,
        interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        self.source, self.parallel = source, parallel
        self.num_samples, self.micro_batch_size = num_samples, micro_batch_size
        self.interrupt = interrupt

    @torch.no_grad()
    def __call__(self, model: Any) -> dict[str, float]:
        was_training = model.training
        model.eval()
        try:
            return self._measure(model)
        finally:
            model.train(was_training)

    def _measure(self, model: Any) -> dict[str, float]:
        names = model.score_names
        total = torch.zeros(len(names), 2, dtype=torch.float64, device=self.parallel.device)
        stride = self.micro_batch_size * self.parallel.data.size
        for start in range(0, self.num_samples, stride):
            heartbeat.beat()
            self.interrupt()
            first = start + self.parallel.data.rank * self.micro_batch_size
            if first >= self.num_samples:
                continue
            numbers = list(range(first, min(first + self.micro_batch_size, self.num_samples)))
            arrays = self.source.collate([self.source.get(number) for number in numbers], numbers)
            batch = {name: torch.from_numpy(array).to(self.parallel.device) for name, array in arrays.items()}
            total += model.scores(batch)
        sums = self.parallel.data.all_reduce_(total).tolist()
        return {f"valid_{name}": part / max(count, 1.0) for name, (part, count) in zip(names, sums, strict=True)}
