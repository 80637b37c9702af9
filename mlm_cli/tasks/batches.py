"""Which units each batch of fine-tuning and of its evaluation holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mlm_cli.data.order import derive_key, permute_many
from mlm_cli.tasks.features import Features, collate

if TYPE_CHECKING:
    import torch

_WINDOW_BATCHES = 16  # global batches that are sorted by length together


class TrainingOrder:
    """Which units each global batch holds: every unit once an epoch, those of like length together.

    Draws are numbered over all epochs; draw g is a pure function of (seed, g), so a resume needs one integer. Runs of
    ``16 * global_batch_size`` draws are sorted by length, cut into batches, and the batches put in random order.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, *, global_batch_size: int, seed: int) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.global_batch_size, self.seed = global_batch_size, seed
        self._window: tuple[int, np.ndarray] | None = None
        self._epoch: tuple[int, np.ndarray] | None = None

    def global_batch(self, step: int) -> np.ndarray:
        """Unit numbers of global batch ``step``, int64 [global_batch_size], ascending in length."""
        window, place = divmod(step, _WINDOW_BATCHES)
        if self._window is None or self._window[0] != window:
            self._window = (window, self._make_window(window))
        return self._window[1][place]

    def _make_window(self, window: int) -> np.ndarray:
        size = _WINDOW_BATCHES * self.global_batch_size
        drawn = np.array([self._draw(window * size + i) for i in range(size)], dtype=np.int64)
        ordered = drawn[np.argsort(self.lengths[drawn], kind="stable")].reshape(_WINDOW_BATCHES, -1)
        places = permute_many(np.arange(_WINDOW_BATCHES), _WINDOW_BATCHES, derive_key(self.seed, 2, window))
        return ordered[places]

    def _draw(self, number: int) -> int:
        epoch, place = divmod(number, len(self.lengths))
        if self._epoch is None or self._epoch[0] != epoch:
            key = derive_key(self.seed, 1, epoch)
            self._epoch = (epoch, permute_many(np.arange(len(self.lengths)), len(self.lengths), key))
        return int(self._epoch[1][place])


def training_batches(
    features: Features,
    *,
    seed: int,
    micro_batch_size: int,
    global_batch_size: int,
    data_rank: int = 0,
    data_size: int = 1,
    start_sample: int = 0,
) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of one data rank without end, from ``start_sample`` (a multiple of the global batch) on."""
    order = TrainingOrder(features.lengths, global_batch_size=global_batch_size, seed=seed)
    step, rest = divmod(start_sample, global_batch_size)
    if rest:
        raise ValueError(f"start_sample {start_sample} is not a multiple of the global batch {global_batch_size}")
    while True:
        numbers = order.global_batch(step)
        for first in range(data_rank * micro_batch_size, global_batch_size, data_size * micro_batch_size):
            yield collate(features, numbers[first : first + micro_batch_size].tolist())
        step += 1


def evaluation_batches(
    features: Features, *, batch_size: int, data_rank: int = 0, data_size: int = 1
) -> Iterator[dict[str, torch.Tensor]]:
    """Every unit once over all data ranks, long ones first."""
    order = np.argsort(-features.lengths, kind="stable")
    for first in range(data_rank * batch_size, len(order), data_size * batch_size):
        yield collate(features, order[first : first + batch_size].tolist())
