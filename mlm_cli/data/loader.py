"""Samples -> micro-batches of torch tensors for one data rank, built ahead by worker processes if asked for.

Micro-batch M (counted from ``start_sample``, over steps) of data rank r holds the samples
``start_sample + (M * data_size + r) * micro_batch_size + j``: together the data ranks read the global samples in
order, whatever their number, and a run resumes anywhere by giving ``start_sample``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mlm_cli.data.loader_workers import WorkerPool

if TYPE_CHECKING:
    import torch

Arrays = dict[str, np.ndarray]


class Source(Protocol):
    """Numbered samples (``packed.SampleSource``); must be picklable if workers are used."""

    def get(self, number: int) -> Mapping[str, np.ndarray | None]: ...

    def collate(self, samples: Sequence[Mapping[str, np.ndarray | None]], numbers: Sequence[int]) -> Arrays: ...


class MicroBatches:
    """Builds micro-batch number M on demand: what a worker process runs. Holds no torch."""

    def __init__(
        self, source: Source, *, start_sample: int, micro_batch_size: int, data_rank: int, data_size: int
    ) -> None:
        self.source, self.start_sample, self.micro_batch_size = source, start_sample, micro_batch_size
        self.data_rank, self.data_size = data_rank, data_size

    def __call__(self, number: int) -> Arrays:
        first = self.start_sample + (number * self.data_size + self.data_rank) * self.micro_batch_size
        numbers = list(range(first, first + self.micro_batch_size))
        return self.source.collate([self.source.get(sample) for sample in numbers], numbers)


def batches(
    source: Source,
    *,
    start_sample: int = 0,
    micro_batch_size: int,
    data_rank: int = 0,
    data_size: int = 1,
    num_workers: int = 0,
    num_batches: int | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of one data rank, without end or ``num_batches`` of them; their tensors are those of ``collate`` of
    the samples.

    The batches are the same for every ``num_workers``. Workers stop when the iterator is closed, collected or used up,
    and when this process dies.

    Raises:
        RankLostError: a worker process died.
        MlmError: whatever reading a sample raised, also in a worker.
    """
    build = MicroBatches(
        source,
        start_sample=start_sample,
        micro_batch_size=micro_batch_size,
        data_rank=data_rank,
        data_size=data_size,
    )
    numbers: Any = count() if num_batches is None else range(num_batches)
    if num_workers == 0:
        for number in numbers:
            yield _to_torch(build(number))
        return
    pool = WorkerPool(build, num_workers)
    try:
        for number in numbers:
            yield _to_torch(pool.result(number))
    finally:
        pool.close()


def _to_torch(arrays: Arrays) -> dict[str, torch.Tensor]:
    import torch

    return {name: torch.from_numpy(array) for name, array in arrays.items()}
