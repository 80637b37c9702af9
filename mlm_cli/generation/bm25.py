"""BM25: passages by the words that they share with a query, rare ones first (Robertson and Zaragoza 2009).

The variant is "Lucene (accurate)" of Kamphuis et al. 2020, table 1, as bm25s has it. Each word of the query adds to the
score of a passage ``ln(1 + (N - df + 0.5) / (df + 0.5)) * tf / (tf + k1 * (1 - b + b * length / mean length))``: of N
passages df have the word, this one tf times among its ``length`` words.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mlm_cli.data.words import UNSPACED
from mlm_cli.errors import UsageError


class _Terms(dict[int, str]):
    """For ``str.translate``: letters, digits and their marks stay, unspaced ones apart; all else parts words."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        kept = unicodedata.category(character)[0] in "LMN"
        alone = any(low <= code < high for low, high in UNSPACED) or code >= 0x20000
        self[code] = (f" {character} " if alone else character) if kept else " "
        return self[code]


_TERMS = _Terms()


def terms(text: str) -> list[str]:
    """What is counted: words without case, in compatibility form (NFKC); in scripts without spaces the characters."""
    return unicodedata.normalize("NFKC", text).casefold().translate(_TERMS).split()


def best(scores: np.ndarray, k: int, above: float = -np.inf) -> list[tuple[int, float]]:
    """``(number, score)`` of the ``k`` highest scores over ``above``, the highest first, of equal ones the first."""
    chosen = np.flatnonzero(scores > above)
    if k < len(chosen):
        least = np.partition(scores[chosen], len(chosen) - k)[len(chosen) - k]
        chosen = chosen[scores[chosen] >= least]
    order = chosen[np.argsort(-scores[chosen], kind="stable")][:k]
    return [(int(number), float(scores[number])) for number in order]


class BM25:
    """Scores of passages. Made by :meth:`of`, or :meth:`load`.

    Raises:
        UsageError: the package bm25s is missing.
    """

    def __init__(self, index: Any) -> None:
        self._index = index

    @classmethod
    def of(cls, texts: Iterable[str], *, k1: float, b: float) -> BM25:
        library, vocabulary = _library(), dict[str, int]()
        ids = [[vocabulary.setdefault(term, len(vocabulary)) for term in terms(text)] for text in texts]
        vocabulary.setdefault("", len(vocabulary))  # the library wants one, which no text has
        index = library.BM25(method="lucene", k1=k1, b=b, backend="numpy")
        with np.errstate(invalid="ignore"):  # passages without a word have no length to compare with
            index.index((ids, vocabulary), show_progress=False)
        return cls(index)

    def search(self, query: str, k: int) -> list[tuple[int, float]]:
        """The best ``k`` passages that have a word of the query, with their scores."""
        known = self._index.get_tokens_ids(terms(query))
        if not known:
            return []
        return best(self._index.get_scores_from_ids(known), k, above=0.0)

    @staticmethod
    def can_ask(query: str) -> bool:
        """Has the query a word?"""
        return bool(terms(query))

    def save(self, folder: Path) -> None:
        self._index.save(folder, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path, num_passages: int) -> BM25:
        """What :meth:`save` wrote, mapped. Numbers and JSON alone are read: nothing that could run.

        Raises:
            OSError, ValueError, KeyError, TypeError: damaged, or not of so many passages.
        """
        index = _library().BM25.load(folder, mmap=True, allow_pickle=False)
        scores, size = index.scores, len(index.scores["indices"])
        starts = scores["indptr"]
        if not (
            scores["num_docs"] == num_passages
            and len(scores["data"]) == size == starts[-1]
            and all(isinstance(number, int) and 0 <= number < len(starts) for number in index.vocab_dict.values())
        ):
            raise ValueError("its parts do not fit each other")
        return cls(index)


def _library() -> Any:
    try:
        import bm25s
    except ImportError:
        raise UsageError(
            "retrieval by BM25 needs the package `bm25s`", hint="pip install 'mlm-cli[retrieval]'"
        ) from None
    return bm25s
