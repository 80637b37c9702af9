"""Sample order as a pure function: random access to a permutation that is never stored.

A permutation of [0, n) is computed, not shuffled: a Feistel network over the grid Z_a x Z_b with a*b just above n
(Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, the generalised Feistel construction), and
cycle walking for the few values past n. Every step is a bijection whatever the round function is, so each number of
[0, n) comes out exactly once; time and memory do not depend on n. The round function is the finaliser of splitmix64
(Steele et al. 2014), in integer arithmetic only: the same on every machine and library version.
"""

from __future__ import annotations

from math import isqrt

import numpy as np

_ROUNDS = 8
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_M1 = 0xBF58476D1CE4E5B9
_M2 = 0x94D049BB133111EB


def mix(value: int) -> int:
    """Spread a 64-bit number over all 64 bits (finaliser of splitmix64, a bijection)."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * _M1) & _MASK
    value = ((value ^ (value >> 27)) * _M2) & _MASK
    return value ^ (value >> 31)


def derive_key(*parts: int) -> int:
    """One 64-bit key out of several numbers (seed, epoch, part ...); the order of the parts counts."""
    key = 0
    for part in parts:
        key = mix(key ^ mix(part & _MASK))
    return key


def _round_keys(key: int) -> list[int]:
    return [mix((key + round_ * _GOLDEN) & _MASK) for round_ in range(1, _ROUNDS + 1)]


def _grid(n: int) -> tuple[int, int]:
    """(a, b) with a*b >= n, nearly square, and a*b - n < a."""
    a = isqrt(n - 1) + 1
    return a, -(-n // a)


def permute(index: int, n: int, key: int) -> int:
    """Where a keyed permutation of [0, n) sends ``index``.

    Raises:
        ValueError: ``index`` is outside [0, n).
    """
    if not 0 <= index < n:
        raise ValueError(f"index {index} is outside [0, {n})")
    a, b = _grid(n)
    keys = _round_keys(key)
    while True:
        left, right = divmod(index, b)
        for number, round_key in enumerate(keys):
            if number % 2 == 0:
                left = (left + mix(right ^ round_key)) % a
            else:
                right = (right + mix(left ^ round_key)) % b
        index = left * b + right
        if index < n:
            return index


def _mix_array(values: np.ndarray) -> np.ndarray:
    values = values + np.uint64(_GOLDEN)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_M1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_M2)
    return values ^ (values >> np.uint64(31))


def draws(key: int, count: int) -> np.ndarray:
    """``count`` random 64-bit numbers, uint64 [count]: splitmix64 started at ``key``. Equal keys give equal numbers."""
    return _mix_array(np.arange(count, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(key))


def fractions(numbers: np.ndarray) -> np.ndarray:
    """Random 64-bit numbers -> float64 in [0, 1), same shape."""
    return (numbers >> np.uint64(11)) * 2.0**-53


def _scramble(values: np.ndarray, a: int, b: int, keys: list[int]) -> np.ndarray:
    left, right = np.divmod(values, np.uint64(b))
    # The remainder is taken before the sum so that it cannot pass 64 bits; the scalar form has no such limit, and
    # (x + y mod a) mod a equals (x + y) mod a, so both agree.
    for number, round_key in enumerate(keys):
        if number % 2 == 0:
            left = (left + _mix_array(right ^ np.uint64(round_key)) % np.uint64(a)) % np.uint64(a)
        else:
            right = (right + _mix_array(left ^ np.uint64(round_key)) % np.uint64(b)) % np.uint64(b)
    return left * np.uint64(b) + right


def permute_many(indices: np.ndarray, n: int, key: int) -> np.ndarray:
    """``permute`` over an array of indices; int64 in, int64 out, same shape.

    Raises:
        ValueError: an index is outside [0, n).
    """
    values = np.asarray(indices, dtype=np.int64)
    if values.size and (int(values.min()) < 0 or int(values.max()) >= n):
        raise ValueError(f"indices must lie in [0, {n})")
    a, b = _grid(n)
    keys = _round_keys(key)
    out = _scramble(values.astype(np.uint64), a, b, keys)
    while (outside := out >= np.uint64(n)).any():
        out[outside] = _scramble(out[outside], a, b, keys)
    return out.astype(np.int64)


def sample_position(number: int, samples_per_epoch: int, seed: int, stream: int = 0) -> tuple[int, int]:
    """(epoch, place inside the epoch) of the ``number``-th sample ever drawn, counting over all epochs.

    ``stream`` keeps several data sets with one seed apart.
    """
    epoch, index = divmod(number, samples_per_epoch)
    return epoch, permute(index, samples_per_epoch, derive_key(seed, stream, epoch))


def epoch_shift(seq_length: int, seed: int, epoch: int, stream: int = 0) -> int:
    """By how many tokens the cuts between samples move in this epoch, in [0, seq_length).

    Later epochs see the same text cut at other places. Epoch 0 starts at the first token, so that training for one
    epoch or less never joins the end of the corpus to its beginning.
    """
    if epoch == 0:
        return 0
    return derive_key(seed, stream, epoch, 1) % seq_length
