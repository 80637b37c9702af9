"""Which data set the g-th sample of a weighted blend comes from: exact within one sample at every prefix.

This is the chairman assignment problem; Tijdeman's rule (Discrete Mathematics 32, 1980) keeps every count within
1 - 1/(2n-2) of its exact share at every prefix, and all counts are exact at the end of a period. A table of one period
gives random access: memory depends on the weights, never on the corpus or on the length of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

import numpy as np

from mlm_cli.errors import UsageError

MAX_PERIOD = 65_536


def _counts_of_one_period(weights: Sequence[Fraction]) -> list[int]:
    """Integer counts proportional to the weights; rounded to a period of ``MAX_PERIOD`` where exact ones need more."""
    total = sum(weights)
    shares = [weight / total for weight in weights]
    period = lcm(*(share.denominator for share in shares))
    if period <= MAX_PERIOD:
        return [int(share * period) for share in shares]
    # Largest remainder, with at least one place for each: a data set that was asked for must not vanish.
    counts = [max(1, int(share * MAX_PERIOD)) for share in shares]
    while (missing := MAX_PERIOD - sum(counts)) != 0:
        gaps = [share * MAX_PERIOD - count for share, count in zip(shares, counts, strict=True)]
        step = 1 if missing > 0 else -1
        movable = [i for i in range(len(counts)) if step > 0 or counts[i] > 1]
        counts[max(movable, key=lambda i: step * gaps[i])] += step
    divisor = gcd(*counts)
    return [count // divisor for count in counts]


def _chairman_table(counts: Sequence[int]) -> np.ndarray:
    """One period of Tijdeman's assignment, int32 [sum(counts)].

    With share c_i/L, the i-th may be chosen at time t once t*c_i/L - x_i >= 1/(2n-2); among those the one that must
    be chosen soonest, (1 - 1/(2n-2) + x_i) * L/c_i, is taken.
    """
    num, period = len(counts), sum(counts)
    table = np.zeros(period, dtype=np.int32)
    if num == 1:
        return table
    share = np.array(counts, dtype=np.int64)
    scale = 2 * num - 2
    chosen = np.zeros(num, dtype=np.int64)
    deadline = (scale - 1) * period / (scale * share.astype(np.float64))
    every = period / share.astype(np.float64)
    for time in range(1, period + 1):
        allowed = scale * (time * share - chosen * period) >= period
        pick = int(np.argmin(np.where(allowed, deadline + chosen * every, np.inf)))
        table[time - 1] = pick
        chosen[pick] += 1
    return table


class Blend:
    """A weighted blend with random access.

    Args:
        weights: positive numbers, any scale. Floats are read as the decimals they print as (0.1 is one tenth).

    Attributes:
        shares: the exact fractions kept. They equal the normalised weights where these have a common denominator of at
            most 65,536; else they are rounded to multiples of 1/65,536 (``rounded`` is then True).

    Raises:
        UsageError: no weights, one that is not positive, or more than 65,536 of them.
    """

    def __init__(self, weights: Sequence[float | int | Fraction]) -> None:
        if not 1 <= len(weights) <= MAX_PERIOD:
            raise UsageError(f"a blend takes 1 to {MAX_PERIOD} data sets, not {len(weights)}")
        if bad := [weight for weight in weights if not 0 < weight < float("inf")]:
            raise UsageError(f"weights of a blend must be positive numbers, not {bad[0]}")
        exact = [weight if isinstance(weight, Fraction) else Fraction(str(weight)) for weight in weights]
        counts = _counts_of_one_period(exact)
        self.counts = np.array(counts, dtype=np.int64)
        self.period = int(self.counts.sum())
        self.shares = tuple(Fraction(count, self.period) for count in counts)
        self.rounded = self.shares != tuple(weight / sum(exact) for weight in exact)
        self._table = _chairman_table(counts)
        self._occurrence = np.empty(self.period, dtype=np.int32)
        for dataset, count in enumerate(counts):
            self._occurrence[self._table == dataset] = np.arange(count, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.shares)

    def locate(self, number: int) -> tuple[int, int]:
        """(data set, how many samples of it came before) for the ``number``-th sample of the blend."""
        period, place = divmod(number, self.period)
        dataset = int(self._table[place])
        return dataset, period * int(self.counts[dataset]) + int(self._occurrence[place])
