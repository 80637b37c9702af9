"""Gopher's rules of document quality and repetition (Rae et al. 2021, https://arxiv.org/abs/2112.11446, appendix A.1).

The paper leaves some words open; here a word is what stands between white space, as written; a line ends at a line
feed, a paragraph at a blank line; blank ones do not count, nor does white space around them. What is duplicate is the
second and every further occurrence. Shares of characters are of those in words (n-grams), in lines or in paragraphs.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mlm_cli.data.ngrams import ngram_numbers, word_numbers

MEAN_WORD_LENGTH = (3, 10)
MAX_SYMBOLS_A_WORD = 0.1  # hash signs; ellipses
MAX_BULLET_LINES = 0.9
MAX_ELLIPSIS_LINES = 0.3
MIN_ALPHABETIC_WORDS = 0.8
STOP_WORDS = frozenset(["the", "be", "to", "of", "and", "that", "have", "with"])
MIN_STOP_WORDS = 2
# Table A1
MAX_DUPLICATE_LINES = MAX_DUPLICATE_PARAGRAPHS = 0.30
MAX_DUPLICATE_LINE_CHARACTERS = MAX_DUPLICATE_PARAGRAPH_CHARACTERS = 0.20
MAX_TOP_NGRAM_CHARACTERS = {2: 0.20, 3: 0.18, 4: 0.16}
MAX_DUPLICATE_NGRAM_CHARACTERS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}

_BULLETS = ("•", "‣", "◦", "▪", "●", "*", "-")
_ELLIPSES = ("...", "…")
_PARAGRAPH = re.compile(r"\n(?:[^\S\n]*\n)+")

Rule = tuple[str, float]  # the first one broken, and what was found


def quality(text: str, words: Sequence[str]) -> Rule | None:
    """The first rule of A.1.1 that ``text`` breaks, without those on the number of words; None if it keeps all."""
    count = len(words)
    mean = sum(map(len, words)) / count if count else 0.0
    if not MEAN_WORD_LENGTH[0] <= mean <= MEAN_WORD_LENGTH[1]:
        return "mean_word_length", mean
    hashes = text.count("#") / count
    if hashes > MAX_SYMBOLS_A_WORD:
        return "hashes_per_word", hashes
    ellipses = sum(text.count(ellipsis) for ellipsis in _ELLIPSES) / count
    if ellipses > MAX_SYMBOLS_A_WORD:
        return "ellipses_per_word", ellipses
    lines = _filled(text.split("\n"))
    bullets = sum(line.startswith(_BULLETS) for line in lines) / len(lines)
    if bullets > MAX_BULLET_LINES:
        return "bullet_lines", bullets
    trailing = sum(line.endswith(_ELLIPSES) for line in lines) / len(lines)
    if trailing > MAX_ELLIPSIS_LINES:
        return "ellipsis_lines", trailing
    alphabetic = sum(word[0].isalpha() or any(map(str.isalpha, word)) for word in words) / count
    if alphabetic < MIN_ALPHABETIC_WORDS:
        return "alphabetic_words", alphabetic
    stop_words = _stop_words(words)
    return ("stop_words", stop_words) if stop_words < MIN_STOP_WORDS else None


def _stop_words(words: Sequence[str]) -> int:
    """Different stop words among ``words``, up to as many as are enough."""
    found: set[str] = set()
    for word in words:
        if (plain := word.strip(string.punctuation).lower()) in STOP_WORDS:
            found.add(plain)
            if len(found) == MIN_STOP_WORDS:
                break
    return len(found)


def repetition(text: str, words: Sequence[str]) -> Rule | None:
    """The first rule of table A1 that ``text`` breaks; None if it keeps all."""
    if not words:
        return None
    for kind, pieces, most, most_characters in (
        ("lines", text.split("\n"), MAX_DUPLICATE_LINES, MAX_DUPLICATE_LINE_CHARACTERS),
        ("paragraphs", _PARAGRAPH.split(text), MAX_DUPLICATE_PARAGRAPHS, MAX_DUPLICATE_PARAGRAPH_CHARACTERS),
    ):
        share, characters = _duplicates(_filled(pieces))
        if share > most:
            return f"duplicate_{kind}", share
        if characters > most_characters:
            return f"characters_in_duplicate_{kind}", characters
    numbers = word_numbers(list(words))
    ends = np.cumsum([0, *map(len, words)])  # [w + 1] characters before each word
    for n, most in MAX_TOP_NGRAM_CHARACTERS.items():
        share = _top_ngram(ngram_numbers(numbers, n), ends, n)
        if share > most:
            return f"top_{n}_gram", share
    for n, most in MAX_DUPLICATE_NGRAM_CHARACTERS.items():
        share = _duplicate_ngrams(ngram_numbers(numbers, n), ends, n)
        if share > most:
            return f"duplicate_{n}_grams", share
        if share == 0:
            break  # no n-gram comes twice, so no longer one does
    return None


def _filled(pieces: Sequence[str]) -> list[str]:
    return [stripped for piece in pieces if (stripped := piece.strip())]


def _duplicates(pieces: Sequence[str]) -> tuple[float, float]:
    """Shares of pieces, and of their characters, that were there before."""
    seen: set[str] = set()
    count = characters = 0
    for piece in pieces:
        if piece in seen:
            count += 1
            characters += len(piece)
        seen.add(piece)
    return count / len(pieces), characters / sum(map(len, pieces))


def _top_ngram(ngrams: npt.NDArray[np.uint64], ends: npt.NDArray[np.int64], n: int) -> float:
    """Share of characters in the most frequent n-gram, the longest of several; 0 where none comes twice."""
    if len(ngrams) < 2:
        return 0.0
    order = np.argsort(ngrams)
    starts = np.flatnonzero(np.diff(ngrams[order], prepend=~ngrams[order[0]]))
    counts = np.diff(starts, append=len(ngrams))
    top = counts.max()
    if top < 2:
        return 0.0
    examples = order[starts[counts == top]]
    return int((ends[examples + n] - ends[examples]).max()) * int(top) / int(ends[-1])


def _duplicate_ngrams(ngrams: npt.NDArray[np.uint64], ends: npt.NDArray[np.int64], n: int) -> float:
    """Share of characters in n-grams that were there before; those of overlapping ones count once."""
    order = np.argsort(ngrams, kind="stable")
    repeated = order[1:][ngrams[order[1:]] == ngrams[order[:-1]]]
    if not len(repeated):
        return 0.0
    covered = np.zeros(len(ends), np.int64)  # +1 where such an n-gram begins, -1 behind it
    np.add.at(covered, repeated, 1)
    np.add.at(covered, repeated + n, -1)
    inside = np.cumsum(covered)[:-1] > 0
    return int(np.diff(ends)[inside].sum()) / int(ends[-1])
