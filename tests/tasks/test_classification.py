"""Features, batches and scores of text classification; scores against scikit-learn."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.errors import DataError
from mlm_cli.tasks.classification import (
    Features,
    TrainingOrder,
    confusion_matrix,
    encode_examples,
    evaluation_batches,
    label_names,
    score_predictions,
    standard_errors,
    training_batches,
)
from mlm_cli.tasks.labelled_text import Example


def example(text: str, label: str, pair: str | None = None) -> Example:
    return Example(text, pair, label, "file.tsv:7")


def test_labels_are_sorted_and_numbers_by_value() -> None:
    assert label_names([example("x", label) for label in ("10", "9", "-1", "9")]) == ("-1", "9", "10")
    assert label_names([example("x", label) for label in ("b", "a", "10")]) == ("10", "a", "b")
    assert label_names([example("x", "a")], ["b", "a"]) == ("b", "a")
    for bad in (None, ["a"], ["a", "a"]):
        with pytest.raises(DataError, match="two or more"):
            label_names([example("x", "a")], bad)


def test_features_are_the_ids_of_the_text() -> None:
    tokenizer = load_tokenizer("bytes")
    examples = [example("abc", "y"), example("", "n"), example("x" * 50, "y")]
    features = encode_examples(examples, ("n", "y"), tokenizer, max_length=8)
    joint = tokenizer.eod_id if tokenizer.eod_id is not None else ord("\n")
    assert [ids.tolist() for ids in features.ids] == [list(b"abc"), [joint], [ord("x")] * 8]
    assert features.labels.tolist() == [1, 0, 1]
    with pytest.raises(DataError, match=r"file\.tsv:7: label `maybe` is not one of `n`, `y`"):
        encode_examples([example("x", "maybe")], ("n", "y"), tokenizer, max_length=8)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("aaa", "bb", "aaa|bb"),
        ("aaaaaaaa", "bb", "aaaa|bb"),
        ("a", "bbbbbbbb", "a|bbbbb"),
        ("aaaaaaa", "bbbbbb", "aaa|bbb"),
    ],
)
def test_pairs_are_joined_and_the_longer_is_cut(first: str, second: str, expected: str) -> None:
    tokenizer = load_tokenizer("bytes")
    joint = tokenizer.eod_id if tokenizer.eod_id is not None else ord("\n")
    (ids,) = encode_examples([example(first, "y", second)], ("n", "y"), tokenizer, max_length=7).ids
    assert ids.tolist() == [joint if c == "|" else ord(c) for c in expected]


def make_features(num: int) -> Features:
    rng = np.random.default_rng(0)
    return Features(tuple(rng.integers(1, 99, n) for n in rng.integers(1, 60, num)), rng.integers(0, 3, num))


def test_every_example_once_an_epoch() -> None:
    features = make_features(256)
    order = TrainingOrder([len(ids) for ids in features.ids], global_batch_size=16, seed=3)
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
                pad_id=0,
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
    order = TrainingOrder([len(ids) for ids in features.ids], global_batch_size=16, seed=1)
    assert straight == [order.global_batch(step).tolist() for step in range(40)]


def test_batches_hold_texts_of_like_length() -> None:
    features = make_features(2000)
    stream = training_batches(features, pad_id=0, seed=1, micro_batch_size=8, global_batch_size=32)
    batches = [next(stream) for _ in range(200)]
    padding = 1 - sum(int(b["lengths"].sum()) for b in batches) / sum(b["tokens"].numel() for b in batches)
    assert padding < 0.05  # in random order: about 0.45
    first_lengths = [float(b["lengths"].float().mean()) for b in batches[:64]]
    assert first_lengths != sorted(first_lengths)


def test_padding_and_lengths() -> None:
    features = Features((np.array([5, 6, 7]), np.array([8])), np.array([1, 0]))
    (batch,) = evaluation_batches(features, pad_id=99, batch_size=4)
    assert batch["tokens"].tolist() == [[5, 6, 7], [8, 99, 99]]
    assert batch["lengths"].tolist() == [3, 1] and batch["labels"].tolist() == [1, 0]
    assert batch["tokens"].dtype == torch.int64


@pytest.mark.parametrize("data_size", [1, 2, 3])
def test_evaluation_sees_every_example_once(data_size: int) -> None:
    features = make_features(50)
    seen = [
        number
        for rank in range(data_size)
        for batch in evaluation_batches(features, pad_id=0, batch_size=4, data_rank=rank, data_size=data_size)
        for number in batch["sample_ids"].tolist()
    ]
    assert sorted(seen) == list(range(50))


@settings(max_examples=100, deadline=None)
@given(
    st.integers(2, 5).flatmap(
        lambda k: st.lists(st.tuples(st.integers(0, k - 1), st.integers(0, k - 1)), min_size=2, max_size=60).map(
            lambda pairs: (k, pairs)
        )
    )
)
def test_scores_are_scikit_learns(case: tuple[int, list[tuple[int, int]]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    num_labels, pairs = case
    labels, predicted = (np.array(values) for values in zip(*pairs))
    found = score_predictions(predicted, labels, num_labels)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(labels, predicted))
    options = {"average": "binary"} if num_labels == 2 else {"average": "macro", "labels": range(num_labels)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = metrics.f1_score(labels, predicted, zero_division=0, **options)
    assert found["f1"] == pytest.approx(expected)
    assert np.array_equal(
        confusion_matrix(predicted, labels, num_labels),
        metrics.confusion_matrix(labels, predicted, labels=range(num_labels)),
    )


def test_standard_errors_are_those_of_drawing_examples_anew() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 300)
    predicted = np.where(rng.random(300) < 0.8, labels, 1 - labels)
    errors = standard_errors(confusion_matrix(predicted, labels, 2), seed=1)
    right = predicted == labels
    assert errors["accuracy"] == pytest.approx(np.std(right, ddof=1) / np.sqrt(300))
    draws = [rng.integers(0, 300, 300) for _ in range(500)]
    expected = np.std([metrics.f1_score(labels[draw], predicted[draw]) for draw in draws])
    assert errors["f1"] == pytest.approx(expected, rel=0.15)
    assert standard_errors(np.array([[1, 0], [0, 0]]), seed=1) == {"accuracy": None, "f1": None}
