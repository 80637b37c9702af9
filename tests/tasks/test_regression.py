"""Correlations against scipy and the sums of their definition; labels that are numbers."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks.task_models import SECTIONS, make_task, wordpiece

from mlm_cli.errors import DataError
from mlm_cli.tasks.correlation import correlations, pearson, ranks, spearman
from mlm_cli.tasks.labelled_text import Columns, Example, number_of, read_examples

SERIES = st.lists(st.tuples(st.integers(-20, 20), st.integers(-20, 20)), min_size=2, max_size=40)


@settings(max_examples=100, deadline=None)
@given(SERIES)
def test_pearson_is_its_definition(pairs: list[tuple[int, int]]) -> None:
    """In exact fractions, but for the root."""
    x, y = zip(*pairs)
    n = len(x)
    sxy = Fraction(sum(a * b for a, b in pairs)) - Fraction(sum(x) * sum(y), n)
    sxx, syy = (Fraction(sum(a * a for a in v)) - Fraction(sum(v) ** 2, n) for v in (x, y))
    expected = float(sxy) / float(sxx * syy) ** 0.5 if sxx * syy else 0.0
    assert pearson(np.array(x), np.array(y)) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(SERIES)
def test_ranks_share_ties(pairs: list[tuple[int, int]]) -> None:
    x = [a for a, _ in pairs]
    expected = [sum(b < a for b in x) + (sum(b == a for b in x) + 1) / 2 for a in x]
    assert ranks(np.array(x)).tolist() == expected


def test_both_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 500).astype(np.float32)
    predicted = (labels + rng.normal(0, 2, 500)).round(1).astype(np.float32)
    found, errors = correlations(predicted, labels, seed=1)
    assert found["pearson"] == pytest.approx(stats.pearsonr(predicted, labels).statistic, abs=1e-6)
    assert found["spearman"] == pytest.approx(stats.spearmanr(predicted, labels).statistic, abs=1e-9)
    assert found["spearman"] == spearman(predicted, labels)
    # of large samples the error of a correlation is near (1 - r^2) / sqrt(n)
    assert errors["pearson"] == pytest.approx((1 - found["pearson"] ** 2) / 500**0.5, rel=0.25)
    assert correlations(predicted[:2], labels[:2], seed=1)[1] == {"pearson": None, "spearman": None}


def test_labels_are_numbers(tmp_path: Path) -> None:
    task = make_task("regression", SECTIONS["bert"], wordpiece(tmp_path))
    features = task.features([Example("the film", "a man", text, "f:1") for text in ("3.25", "-1e1")])
    assert features.targets["labels"].tolist() == [3.25, -10.0] and features.rows[0].types.any()
    for text in ("good", "nan", "inf"):
        with pytest.raises(DataError, match=rf"f\.tsv:3: label `{text}` is not a number"):
            task.features([Example("x", None, text, "f.tsv:3")])


def test_the_real_file(test_data: Path) -> None:
    for name, lines in (("sts-train.tsv", 5749), ("sts-dev.tsv", 1500)):
        examples = read_examples(test_data / "finetune/stsb" / name, Columns(5, 4, 6))
        scores = [number_of(example) for example in examples]
        assert len(scores) == lines and min(scores) == 0 and max(scores) == 5
