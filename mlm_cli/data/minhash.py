"""MinHash signatures and the bands that find documents with similar ones (Broder 1997; Leskovec et al., chapter 3).

Of two documents, each number of their signatures agrees with a chance that is the Jaccard similarity of their sets of
shingles: the share of agreeing numbers estimates it, with a standard deviation of sqrt(s (1 - s) / num_permutations).
Signatures are cut into bands; documents with one band in common are compared in full.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from mlm_cli.data.ngrams import Numbers, mixed, ngram_numbers

Signature = npt.NDArray[np.uint32]

NO_SHINGLE = np.uint32(0xFFFFFFFF)
_BLOCK = 512  # shingles at a time: their numbers times 128 permutations stay in the cache
_MIN_RECALL = 0.99


def shingles(words: Numbers, n: int) -> npt.NDArray[np.uint64]:
    """Numbers of the different n-grams of a document's words, 32 bits each; of one shorter than n, that of all."""
    if not len(words):
        return np.zeros(0, np.uint64)
    return np.unique(ngram_numbers(words, min(n, len(words))) >> np.uint64(32))


class MinHash:
    """Signatures of ``num_permutations`` numbers.

    Permutations are multiply-add-shift functions, 64 -> 32 bits, 2-universal (Dietzfelbinger 1996), drawn once from a
    hash function: the same in every process.
    """

    def __init__(self, num_permutations: int) -> None:
        drawn = hashlib.shake_256(b"mlm minhash").digest(16 * num_permutations)
        factors = np.frombuffer(drawn, "<u8").reshape(num_permutations, 2)
        self._multiply = factors[:, 0].copy() | np.uint64(1)
        self._add = factors[:, 1].copy()

    def signature(self, shingles: npt.NDArray[np.uint64]) -> Signature:
        """[num_permutations] of a document's shingles; all ``NO_SHINGLE`` where there is none."""
        lowest = np.full(len(self._add), ~np.uint64(0))
        for start in range(0, len(shingles), _BLOCK):
            block = shingles[start : start + _BLOCK, None] * self._multiply
            block += self._add
            np.minimum(lowest, block.min(axis=0), out=lowest)
        return (lowest >> np.uint64(32)).astype(np.uint32)  # the shift keeps order: once, after the minimum


def bands_for(threshold: float, num_permutations: int) -> tuple[int, int]:
    """(bands, rows of each) that miss less than 1 % of pairs just at ``threshold``, with the longest rows.

    Two signatures of similarity s agree in a whole band with a chance of 1 - (1 - s^rows)^bands.
    """
    best = (num_permutations, 1)
    for rows in range(1, num_permutations + 1):
        bands = num_permutations // rows
        if 1 - (1 - threshold**rows) ** bands >= _MIN_RECALL:
            best = (bands, rows)
    return best


def band_keys(signatures: Signature, bands: int, rows: int) -> Numbers:
    """[d, bands] keys of signatures [d, num_permutations]: equal where a band agrees in all its rows."""
    pieces = signatures[:, : bands * rows].reshape(len(signatures), bands, rows).astype(np.uint64)
    numbers = np.arange(1, bands + 1, dtype=np.uint64) << np.uint64(32)  # above the 32 bits of a signature's number
    keys = np.broadcast_to(numbers, pieces.shape[:2])
    for row in range(rows):
        keys = mixed(keys ^ pieces[:, :, row]) + np.uint64(row + 1)
    return keys
