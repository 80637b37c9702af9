"""Words and n-grams of words as 64-bit numbers: what near duplicates and texts of test sets are found by.

The numbers depend on nothing but the text: not on the process, the machine or Python's salted hashes. Two different
n-grams have the same number with a chance of 2^-64.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.uint64]

# Scripts written without spaces (Thai to Myanmar, Khmer, kana and Han): there each character is a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_CHARACTER = re.compile(f"[{_UNSPACED}]")
_WORD_OR_CHARACTER = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_WORD = re.compile(r"\w+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: Knuth's multiplicative hashing
_KNOWN: dict[str, int] = {}
_MOST_KNOWN = 1 << 18  # words remembered by a process: some 30 MB


def words_of(text: str) -> list[str]:
    """Runs of letters and digits in small letters, composed (NFC); punctuation and white space do not count."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return (_WORD_OR_CHARACTER if _CHARACTER.search(text) else _WORD).findall(text.lower())


def word_numbers(words: list[str]) -> Numbers:
    """A number a word, [n]."""
    if len(_KNOWN) > _MOST_KNOWN:
        _KNOWN.clear()
    known = _KNOWN
    for word in {word for word in words if word not in known}:
        known[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
    return np.array([known[word] for word in words], np.uint64)


def ngram_numbers(numbers: Numbers, n: int) -> Numbers:
    """A number for each run of n words: [w] -> [w - n + 1]; none where there are fewer words."""
    count = max(0, len(numbers) - n + 1)
    found = np.zeros(count, np.uint64)
    for offset in range(n if count else 0):  # a polynomial in the multiplier, modulo 2^64
        found *= _MULTIPLIER
        found += numbers[offset : offset + count]
    return mixed(found)


def mixed(numbers: Numbers) -> Numbers:
    """A bijection that spreads every bit over all of them (splitmix64's last steps; Steele et al. 2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
