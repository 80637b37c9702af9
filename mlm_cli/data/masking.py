"""Masked language modelling: which tokens of a sample are hidden, and what stands in their place.

Devlin et al. 2019 (https://arxiv.org/abs/1810.04805), section 3.1 and appendix A.1, over whole words and n-grams of
words as Megatron-LM's ``create_masked_lm_predictions`` (``megatron/core/datasets/masked_dataset.py``): words in random
order each begin an n-gram, n drawn with probability ~ 1/n (as ALBERT), until the budget is spent; an n-gram that would
pass it is shortened, one that meets a masked word is left out. Of the chosen tokens 80 % become `[MASK]`, 10 % a random
token and 10 % stay. Two things differ: an n-gram never reaches from sentence A into B, and a random token is never a
special one.

Everything is a function of the key: no state, no generator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlm_cli.data.order import draws, fractions
from mlm_cli.data.words import Words

_MASKED, _RANDOM = 0.8, 0.1  # shares of the chosen tokens; the rest stay as they are


def budget(num_tokens: int, probability: float) -> int:
    """How many of ``num_tokens`` (special ones included, as in BERT) are to be predicted; at least one."""
    return max(1, int(num_tokens * probability + 0.5))


@dataclass(frozen=True)
class Masked:
    """A sample with tokens hidden: ``tokens`` int64 [s]; ``positions`` int64 [m], rising; ``labels`` int64 [m]."""

    tokens: np.ndarray
    positions: np.ndarray
    labels: np.ndarray


class Masking:
    """Hides tokens of samples.

    Args:
        words: word boundaries of the vocabulary.
        mask_id: what stands for a hidden token.
        replacements: ids a hidden token may be replaced by, int64 [r].
        probability: share of tokens to predict.
        max_ngram: longest run of words hidden together.
    """

    def __init__(
        self, words: Words, mask_id: int, replacements: np.ndarray, *, probability: float, max_ngram: int
    ) -> None:
        self.words, self.mask_id, self.replacements = words, mask_id, replacements
        self.probability, self.max_ngram = probability, max_ngram
        # row a: cumulated probabilities of n = 1, 2 ... where only a words are left before the end of the text
        self._cumulated = np.ones((max_ngram + 1, max_ngram))
        for left in range(1, max_ngram + 1):
            chances = 1.0 / np.arange(1, left + 1)
            self._cumulated[left, :left] = np.cumsum(chances) / chances.sum()
            self._cumulated[left, left - 1 :] = 1.0

    def __call__(self, tokens: np.ndarray, texts: list[tuple[int, int]], key: int) -> Masked:
        """Hide tokens of one sample.

        Args:
            tokens: ids int64 [s], special ones included; not changed.
            texts: [begin, end) of the sentences A and B in it, without special tokens.
            key: decides everything.
        """
        starts, ends, room = self._words(tokens, texts)
        num_words = len(starts)
        random = draws(key, 2 * num_words + 2 * len(tokens))
        sizes = self._ngrams(room, fractions(random[num_words : 2 * num_words]))
        order = np.argsort(random[:num_words])
        chosen = _choose(
            order.tolist(), starts.tolist(), ends.tolist(), sizes.tolist(), len(tokens), self._limit(tokens)
        )
        positions = np.flatnonzero(chosen)
        labels = tokens[positions]
        changed = tokens.copy()
        dice = fractions(random[2 * num_words : 2 * num_words + len(positions)])
        other = random[2 * num_words + len(tokens) : 2 * num_words + len(tokens) + len(positions)]
        other = self.replacements[(other % np.uint64(len(self.replacements))).astype(np.int64)]
        kept = np.where(dice < _MASKED + _RANDOM, other, labels)
        changed[positions] = np.where(dice < _MASKED, self.mask_id, kept)
        return Masked(changed, positions, labels)

    def _limit(self, tokens: np.ndarray) -> int:
        return budget(len(tokens), self.probability)

    def _words(self, tokens: np.ndarray, texts: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(first token, end) of each word, and how many words from it on, at most ``max_ngram``, end with its text."""
        starts, ends, room = [], [], []
        for begin, end in texts:
            places = np.flatnonzero(self.words.starts(tokens[begin:end])) + begin
            if len(places):
                starts.append(places)
                ends.append(np.append(places[1:], end))
                room.append(np.minimum(np.arange(len(places), 0, -1), self.max_ngram))
        if not starts:
            return (np.zeros(0, np.int64),) * 3
        return np.concatenate(starts), np.concatenate(ends), np.concatenate(room)

    def _ngrams(self, room: np.ndarray, chance: np.ndarray) -> np.ndarray:
        """Words of the n-gram that each word would begin: n of [1, room] with probability ~ 1/n."""
        return 1 + (chance[:, None] >= self._cumulated[room]).sum(axis=1)


def _choose(
    order: list[int], starts: list[int], ends: list[int], sizes: list[int], num_tokens: int, limit: int
) -> np.ndarray:
    """Take words in ``order``, with the n-grams they begin, until ``limit`` tokens are taken; uint8 [s], 1: taken."""
    taken = bytearray(num_tokens)
    count = 0
    for word in order:
        begin, size = starts[word], sizes[word]
        while size and ends[word + size - 1] - begin > limit - count:
            size -= 1
        if not size:
            continue
        length = ends[word + size - 1] - begin
        if taken.find(1, begin, begin + length) >= 0:
            continue
        taken[begin : begin + length] = b"\1" * length
        count += length
        if count == limit:
            break
    return np.frombuffer(taken, np.uint8)
