"""Features, batches and scores of text classification; scores against scikit-learn."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlm_cli.config.schema import ModelSection, TaskSection
from mlm_cli.data.tokenizer import Tokenizer, load_tokenizer
from mlm_cli.errors import DataError, UsageError
from mlm_cli.tasks.classification import (
    Classification,
    confusion_matrix,
    label_names,
    score_predictions,
    standard_errors,
)
from mlm_cli.tasks.encoding import TextEncoder
from mlm_cli.tasks.features import Features
from mlm_cli.tasks.labelled_text import Columns, Example, read_examples


def example(text: str, label: str, pair: str | None = None) -> Example:
    return Example(text, pair, label, "file.tsv:7")


def test_labels_are_sorted_and_numbers_by_value() -> None:
    assert label_names([example("x", label) for label in ("10", "9", "-1", "9")]) == ("-1", "9", "10")
    assert label_names([example("x", label) for label in ("b", "a", "10")]) == ("10", "a", "b")
    assert label_names([example("x", "a")], ["b", "a"]) == ("b", "a")
    for bad in (None, ["a"], ["a", "a"]):
        with pytest.raises(DataError, match="two or more"):
            label_names([example("x", "a")], bad)


def features_of(examples: list[Example], max_length: int, tokenizer: Tokenizer, model: ModelSection) -> Features:
    section = TaskSection(train="", dev="")
    return Classification(section, TextEncoder(tokenizer, model, max_length), ("n", "y")).features(examples)


def test_features_are_the_ids_of_the_text() -> None:
    tokenizer = load_tokenizer("bytes")
    examples = [example("abc", "y"), example("", "n"), example("x" * 50, "y")]
    features = features_of(examples, 8, tokenizer, ModelSection())
    joint = tokenizer.eod_id if tokenizer.eod_id is not None else ord("\n")
    assert [row.ids.tolist() for row in features.rows] == [list(b"abc"), [joint], [ord("x")] * 8]
    assert features.targets["labels"].tolist() == [1, 0, 1]
    with pytest.raises(DataError, match=r"file\.tsv:7: label `maybe` is not one of `n`, `y`"):
        features_of([example("x", "maybe")], 8, tokenizer, ModelSection())


PAIRS = [
    ("aaa", "bb", "aaa|bb"),
    ("aaaaaaaa", "bb", "aaaa|bb"),
    ("a", "bbbbbbbb", "a|bbbbb"),
    ("aaaaaaa", "bbbbbb", "aaa|bbb"),
]


@pytest.mark.parametrize(("first", "second", "expected"), PAIRS)
def test_pairs_are_joined_and_the_longer_is_cut(first: str, second: str, expected: str) -> None:
    tokenizer = load_tokenizer("bytes")
    joint = tokenizer.eod_id if tokenizer.eod_id is not None else ord("\n")
    (row,) = features_of([example(first, "y", second)], 7, tokenizer, ModelSection()).rows
    assert row.ids.tolist() == [joint if c == "|" else ord(c) for c in expected] and not row.types.any()


def test_bert_reads_what_transformers_makes_of_pairs(test_data: Path, tmp_path: Path) -> None:
    """Marks, types and the cutting of the longer text, on real pairs."""
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(test_data / "tokenizers/bert-base-uncased")
    tokenizer.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    columns = Columns("#1 String", "Quality", "#2 String")
    examples = read_examples(test_data / "finetune/mrpc/msr-para-val.tsv", columns)[:200]
    model = ModelSection(family="bert", num_token_types=2)
    for length in (40, 128):
        encoder, cut = TextEncoder(tokenizer, model, length), 0
        for found, pair in zip(
            encoder.rows([e.text for e in examples], [e.text_pair or "" for e in examples]), examples, strict=True
        ):
            expected = theirs(pair.text, pair.text_pair, truncation=True, max_length=length, return_token_type_ids=True)
            assert len(found) == len(expected["input_ids"]) <= length
            assert found.ids.tolist() == expected["input_ids"] and found.types.tolist() == expected["token_type_ids"]
            cut += len(found) == length
        assert cut > 20 or length > 40
    single = encoder.rows([examples[0].text])[0]
    assert single.ids.tolist() == theirs(examples[0].text)["input_ids"] and not single.types.any()
    assert encoder.rows([""])[0].ids.tolist() == [101, 102]


def test_bert_needs_its_special_tokens() -> None:
    with pytest.raises(DataError, match=r"`bytes` has no \[CLS\], \[SEP\]"):
        TextEncoder(load_tokenizer("bytes"), ModelSection(family="bert"), 16)
    with pytest.raises(UsageError, match="leave no room"):
        TextEncoder(load_tokenizer("bytes"), ModelSection(), 1)


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
