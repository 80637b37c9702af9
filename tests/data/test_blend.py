"""Blends keep their weights within one sample at every prefix; splits cut where Megatron-LM cuts."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlm_cli.config.split import parse_split
from mlm_cli.data.blend import MAX_PERIOD, Blend
from mlm_cli.data.split import split_documents
from mlm_cli.errors import UsageError


def check_prefixes(blend: Blend, shares: list[Fraction], length: int) -> None:
    counts = [0] * len(shares)
    for number in range(length):
        dataset, occurrence = blend.locate(number)
        assert occurrence == counts[dataset]  # each data set is read in its own order, without gaps
        counts[dataset] += 1
        assert all(abs(count - (number + 1) * share) < 1 for count, share in zip(counts, shares))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=9))
def test_within_one_sample_of_the_weights_at_every_prefix(weights: list[int]) -> None:
    blend = Blend(weights)
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    assert not blend.rounded and list(blend.shares) == shares
    check_prefixes(blend, shares, 2 * blend.period + 3)


def test_decimal_weights_are_exact() -> None:
    blend = Blend([0.1, 0.2, 0.7])
    assert blend.period == 10
    check_prefixes(blend, [Fraction(1, 10), Fraction(1, 5), Fraction(7, 10)], 40)


def test_one_dominant_and_many_small() -> None:
    weights = [1000] + [1] * 30
    check_prefixes(Blend(weights), [Fraction(weight, 1030) for weight in weights], 2100)


def test_counts_far_out_are_exact() -> None:
    blend = Blend([3, 5, 9])
    period = 10**15 // 17
    assert blend.locate(period * 17)[1] == period * {0: 3, 1: 5, 2: 9}[blend.locate(0)[0]]


def test_long_periods_are_rounded_and_say_so() -> None:
    weights = [0.123457, 0.3, 0.5, 1e-9]
    blend = Blend(weights)
    assert blend.rounded and blend.period <= MAX_PERIOD and min(blend.counts) >= 1
    for share, weight in zip(blend.shares, weights):
        assert abs(float(share) - weight / sum(weights)) <= 1.5 / MAX_PERIOD
    check_prefixes(blend, list(blend.shares), 3000)


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -2], [float("nan")], [float("inf"), 1]])
def test_bad_weights(weights: list[float]) -> None:
    with pytest.raises(UsageError):
        Blend(weights)


def megatron_split(text: str, num: int) -> list[tuple[int, int]]:
    """The published arithmetic: normalise in float64, cumulate, round both ends of each split."""
    vector = [float(field) for field in text.split(",")]
    vector += [0.0] * (3 - len(vector))
    shares = (np.array(vector) / np.sum(np.array(vector))).tolist()
    ends = [0]
    for share in shares:
        ends.append(ends[-1] + share)
    return [(round(low * float(num)), round(high * float(num))) for low, high in pairwise(ends)]


@pytest.mark.parametrize("text", ["969,30,1", "949,50,1", "98,1,1", "0.5,0.25,0.25", "100,0,0", "90,10", "1"])
@pytest.mark.parametrize("num", [0, 1, 2, 3, 7, 50, 333, 1000, 99_999, 10**8 + 3])
def test_splits_as_megatron(text: str, num: int) -> None:
    found = split_documents(text, num)
    assert [(part.start, part.stop) for part in found.values()] == megatron_split(text, num)
    assert sum(len(part) for part in found.values()) == num


@pytest.mark.parametrize("text", ["", "a,b,c", "1,2,3,4", "0,0,0", "-1,2,0", "nan,1,1"])
def test_bad_splits(text: str) -> None:
    with pytest.raises(ValueError, match="up to three shares"):
        parse_split(text)
