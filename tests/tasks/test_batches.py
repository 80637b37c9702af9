"""Units as batches: order, padding, and the same samples in any layout."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from mlm_cli.tasks.batches import TrainingOrder, evaluation_batches, training_batches
from mlm_cli.tasks.encoding import Row
from mlm_cli.tasks.features import Features, collate


def row(ids: Sequence[int] | np.ndarray, types: Sequence[int] | None = None) -> Row:
    return Row(np.array(ids), np.array(types if types is not None else [0] * len(ids)), 0, len(ids))


def make_features(num: int) -> Features:
    rng = np.random.default_rng(0)
    return Features(
        tuple(row(rng.integers(1, 99, n)) for n in rng.integers(1, 60, num)), 0, {"labels": rng.integers(0, 3, num)}
    )


def test_every_example_once_an_epoch() -> None:
    features = make_features(256)
    order = TrainingOrder(features.lengths, global_batch_size=16, seed=3)
    for epoch in range(3):
        drawn = np.concatenate([order.global_batch(step) for step in range(16 * epoch, 16 * epoch + 16)])
        assert sorted(drawn) == list(range(256))


def test_epochs_that_do_not_fill_a_batch_lose_nothing() -> None:
    order = TrainingOrder([5] * 37, global_batch_size=16, seed=3)
    drawn = np.concatenate([order.global_batch(step) for step in range(16 * 37)])
    assert (np.bincount(drawn, minlength=37) == 16 * 16).all()


def test_batches_are_the_same_for_any_data_ranks_and_resume_anywhere() -> None:
    features = make_features(300)

    def samples(data_size: int, start_step: int, steps: int) -> list[list[int]]:
        streams = [
            training_batches(
                features,
                seed=1,
                micro_batch_size=2,
                global_batch_size=16,
                data_rank=rank,
                data_size=data_size,
                start_sample=16 * start_step,
            )
            for rank in range(data_size)
        ]
        per_step = 16 // (2 * data_size)
        return [
            [number for _ in range(per_step) for stream in streams for number in next(stream)["sample_ids"].tolist()]
            for _ in range(steps)
        ]

    straight = samples(1, 0, 40)
    assert samples(2, 0, 40) == samples(4, 0, 40) == straight
    assert samples(1, 23, 17) == straight[23:]
    order = TrainingOrder(features.lengths, global_batch_size=16, seed=1)
    assert straight == [order.global_batch(step).tolist() for step in range(40)]


def test_batches_hold_texts_of_like_length() -> None:
    features = make_features(2000)
    stream = training_batches(features, seed=1, micro_batch_size=8, global_batch_size=32)
    batches = [next(stream) for _ in range(200)]
    padding = 1 - sum(int(b["lengths"].sum()) for b in batches) / sum(b["tokens"].numel() for b in batches)
    assert padding < 0.05  # in random order: about 0.45
    first_lengths = [float(b["lengths"].float().mean()) for b in batches[:64]]
    assert first_lengths != sorted(first_lengths)


def test_padding_and_lengths() -> None:
    features = Features((row([5, 6, 7], [0, 0, 1]), row([8])), 99, {"labels": np.array([1, 0])})
    (batch,) = evaluation_batches(features, batch_size=4)
    assert batch["tokens"].tolist() == [[5, 6, 7], [8, 99, 99]]
    assert batch["token_types"].tolist() == [[0, 0, 1], [0, 0, 0]]
    assert batch["lengths"].tolist() == [3, 1] and batch["labels"].tolist() == [1, 0]
    assert batch["tokens"].dtype == torch.int64 and "members" not in batch


def test_units_of_several_rows() -> None:
    rows = tuple(row([number] * length) for number, length in ((1, 2), (2, 1), (3, 3), (4, 1), (5, 1)))
    features = Features(rows, 0, {"labels": np.array([1, 0])}, starts=np.array([0, 2, 5]))
    assert len(features) == 2 and features.lengths.tolist() == [2, 3]
    batch = collate(features, [1, 0])
    assert batch["tokens"].tolist() == [[3, 3, 3], [4, 0, 0], [5, 0, 0], [1, 1, 0], [2, 0, 0]]
    assert batch["members"].tolist() == [[0, 1, 2], [3, 4, -1]] and batch["labels"].tolist() == [0, 1]
    assert features.subset([1]).lengths.tolist() == [3] and features.subset([1]).starts.tolist() == [0, 3]
    assert features.digest() != features.subset([1, 0]).digest()


def test_labels_of_tokens() -> None:
    features = Features((row([5, 6, 7]), row([8])), 0, token_labels=(np.array([-100, 2, 1]), np.array([0])))
    assert collate(features, [1, 0])["labels"].tolist() == [[0, -100, -100], [-100, 2, 1]]


@pytest.mark.parametrize("data_size", [1, 2, 3])
def test_evaluation_sees_every_example_once(data_size: int) -> None:
    features = make_features(50)
    seen = [
        number
        for rank in range(data_size)
        for batch in evaluation_batches(features, batch_size=4, data_rank=rank, data_size=data_size)
        for number in batch["sample_ids"].tolist()
    ]
    assert sorted(seen) == list(range(50))
