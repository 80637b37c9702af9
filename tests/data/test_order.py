"""The keyed permutation: a bijection at every size, close to uniform, constant in n."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from mlm_cli.data.order import derive_key, epoch_shift, permute, permute_many, sample_position


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 97, 1000, 4096, 65_537])
def test_every_number_comes_out_exactly_once(n: int) -> None:
    for key in (0, 1, 2**64 - 1):
        assert np.array_equal(np.sort(permute_many(np.arange(n), n, key)), np.arange(n))


@pytest.mark.parametrize("n", [1, 7, 1000, 2**31 + 11, 10**12 + 7, 2**62])
def test_array_and_single_form_agree(n: int) -> None:
    indices = np.unique(np.linspace(0, n - 1, 50).astype(np.int64).clip(0, n - 1))
    assert permute_many(indices, n, 99).tolist() == [permute(int(i), n, 99) for i in indices]


def test_values_are_frozen() -> None:
    """The order is part of the data format: a changed value would change every resumed run."""
    assert [permute(i, 10, 7) for i in range(10)] == [2, 9, 7, 8, 6, 4, 3, 5, 0, 1]
    assert permute(123_456_789, 10**12, derive_key(1234, 0, 3)) == 600_491_133_064


@pytest.mark.parametrize("n", [2, 3, 4])
def test_all_orders_of_few_are_about_equally_likely(n: int) -> None:
    """Chi-square over all n! orders, 3,000 keys; limits are the 99.99 % points for 1, 5 and 23 degrees of freedom."""
    seen = Counter(tuple(permute_many(np.arange(n), n, derive_key(key)).tolist()) for key in range(3000))
    orders = list(permutations(range(n)))
    expected = 3000 / len(orders)
    statistic = sum((seen[order] - expected) ** 2 / expected for order in orders)
    assert statistic < {2: 15.1, 3: 25.7, 4: 56.0}[n]


def test_first_draws_and_neighbours_look_uniform() -> None:
    n = 1000
    firsts = np.array([permute(0, n, derive_key(key)) for key in range(20_000)])
    counts = np.bincount(firsts // 10, minlength=100)
    assert ((counts - 200) ** 2 / 200).sum() < 180  # 99 degrees of freedom, far beyond the 99.99 % point
    order = permute_many(np.arange(100_003), 100_003, 5)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.02
    # Fixed points of a random permutation: Poisson with mean 1, whatever n.
    fixed = [int((permute_many(np.arange(n), n, derive_key(5, key)) == np.arange(n)).sum()) for key in range(300)]
    assert 0.7 < np.mean(fixed) < 1.3


def test_a_permutation_of_any_size_is_walked_by_nobody() -> None:
    tracemalloc.start()
    for number in range(200):
        sample_position(number + 10**15, 10**15, seed=1)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_positions_cover_each_epoch_and_differ_between_epochs_seeds_and_streams() -> None:
    def epoch(seed: int, stream: int, number: int) -> list[int]:
        drawn = [sample_position(number * 50 + i, 50, seed, stream) for i in range(50)]
        assert {e for e, _ in drawn} == {number}
        return [place for _, place in drawn]

    orders = [epoch(1, 0, 0), epoch(1, 0, 1), epoch(2, 0, 0), epoch(1, 1, 0)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_shift_is_zero_at_first_and_then_spread() -> None:
    assert epoch_shift(256, 1, 0) == 0
    shifts = [epoch_shift(256, 1, epoch) for epoch in range(1, 500)]
    assert min(shifts) >= 0 and max(shifts) < 256 and len(set(shifts)) > 180


def test_outside_is_refused() -> None:
    for index in (-1, 10):
        with pytest.raises(ValueError, match="outside"):
            permute(index, 10, 0)
        with pytest.raises(ValueError, match="lie in"):
            permute_many(np.array([index]), 10, 0)
