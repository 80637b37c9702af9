"""Gopher's rules against the paper's sentences written out over plain strings, and each threshold from both sides."""

from __future__ import annotations

import gzip
import random
from collections import Counter
from pathlib import Path

import pytest

from mlm_cli.data import gopher

PROSE = "the cat and a dog went to that house of brick with some bread that they have"


def quality(text: str) -> str | None:
    broken = gopher.quality(text, text.split())
    return broken[0] if broken else None


def repetition(text: str) -> tuple[str, float] | None:
    return gopher.repetition(text, text.split())


# The same, one step after another, without numbers for words and without arrays.


def duplicate_share(pieces: list[str]) -> tuple[float, float]:
    pieces = [piece.strip() for piece in pieces if piece.strip()]
    again = [piece for place, piece in enumerate(pieces) if piece in pieces[:place]]
    return len(again) / len(pieces), sum(map(len, again)) / sum(map(len, pieces))


def top_share(words: list[str], n: int) -> float:
    counts = Counter(tuple(words[at : at + n]) for at in range(len(words) - n + 1))
    most = max(counts.values(), default=0)
    if most < 2:
        return 0.0
    return most * max(len("".join(gram)) for gram, count in counts.items() if count == most) / len("".join(words))


def duplicate_ngram_share(words: list[str], n: int) -> float:
    seen: set[tuple[str, ...]] = set()
    covered = [False] * len(words)
    for at in range(len(words) - n + 1):
        gram = tuple(words[at : at + n])
        if gram in seen:
            covered[at : at + n] = [True] * n
        seen.add(gram)
    return sum(len(word) for word, inside in zip(words, covered, strict=True) if inside) / len("".join(words))


def plain_repetition(text: str) -> tuple[str, float] | None:
    words = text.split()
    if not words:
        return None
    paragraphs: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip():
            paragraphs[-1].append(line)
        elif paragraphs[-1]:
            paragraphs.append([])
    for kind, pieces in (("lines", text.split("\n")), ("paragraphs", ["\n".join(lines) for lines in paragraphs])):
        count, characters = duplicate_share(pieces)
        if count > 0.30:
            return f"duplicate_{kind}", count
        if characters > 0.20:
            return f"characters_in_duplicate_{kind}", characters
    for n, most in ((2, 0.20), (3, 0.18), (4, 0.16)):
        if (share := top_share(words, n)) > most:
            return f"top_{n}_gram", share
    for n, most in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10)):
        if (share := duplicate_ngram_share(words, n)) > most:
            return f"duplicate_{n}_grams", share
    return None


def repeating_text(chance: random.Random) -> str:
    """Some lines and paragraphs; a few phrases come again and again, or hardly ever."""
    vocabulary = ["".join(chance.choices("abcdefgh", k=chance.randint(1, 8))) for _ in range(chance.choice([40, 900]))]
    phrases = [" ".join(chance.choices(vocabulary, k=chance.randint(1, 14))) for _ in range(chance.choice([1, 12, 60]))]
    often, breaks = chance.choice([0.0, 0.02, 0.05, 0.4]), chance.choice([0.01, 0.1, 0.5])
    parts = [chance.choice(phrases) if chance.random() < often else chance.choice(vocabulary) for _ in range(120)]
    ends = ["\n", "\n \n", " \n", "\n\n"]
    return "".join(part + (chance.choice(ends) if chance.random() < breaks else " ") for part in parts)


def test_repetition_is_its_definition() -> None:
    chance = random.Random(5)
    rules: Counter[str] = Counter()
    for _ in range(400):
        text = repeating_text(chance)
        found, wanted = repetition(text), plain_repetition(text)
        assert (found and found[0]) == (wanted and wanted[0]), text
        if found and wanted:
            assert found[1] == pytest.approx(wanted[1])
        rules[found[0] if found else "kept"] += 1
    assert len(rules) >= 10 and rules["kept"] > 50, rules


@pytest.mark.parametrize(("n", "most"), [(5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10)])
def test_each_duplicate_ngram_has_its_own_threshold(n: int, most: float) -> None:
    """One run of n words that comes again, in a text where it is just not, and just, too much of it."""
    for spare, kept in ((2, True), (-2, False)):
        others = [f"w{place:04}" for place in range(round(n / most) - n + spare)]
        words = [*others[:n], *(f"r{place:04}" for place in range(n)), *others[2 * n :], "x9999"]
        words = [*words, *words[n : 2 * n]]
        found = repetition(" ".join(words))
        share = duplicate_ngram_share(words, n)
        assert (share > most) is not kept
        assert (found is None or found[0] != f"duplicate_{n}_grams") if kept else found is not None


def test_a_novel_is_kept_and_the_same_twice_is_not(test_data: Path) -> None:
    path = test_data / "corpora/english_novels/Stevenson_Treasure_1883.txt.gz"
    text = gzip.decompress(path.read_bytes()).decode("utf-8-sig")[:60_000]
    assert repetition(text) is None and quality(text) is None
    assert repetition(text[:3000] * 2) == plain_repetition(text[:3000] * 2)
    assert repetition(text[:3000] * 2) is not None


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (PROSE, None),
        ("abc the and " * 20, None),  # a mean of just 3
        ("abc the and " * 20 + "ab", "mean_word_length"),
        ("abcdefghijklmnopq the " * 20 + "abcdefghijklmnopq and " * 20, None),  # of just 10
        ("abcdefghijklmnopq the " * 20 + "abcdefghijklmnopqr and " * 20, "mean_word_length"),
        ("", "mean_word_length"),
        ("#word #word" + " word the of" * 6, None),  # 2 in 20 words
        ("#word #word #" + " word the of" * 6, "hashes_per_word"),
        ("word the of bread... " * 2 + "words " * 12, None),
        ("word the of bread… " * 2 + "words " * 11, "ellipses_per_word"),  # 2 in 19
        ("- the bread of the house\n" * 9 + "the bread", None),  # 9 of 10 lines
        ("• the bread of the house\n" * 19 + "\n\nthe bread", "bullet_lines"),  # 19 of 20, blank ones not counted
        ("the bread of the house\n" * 7 + "the bread of the whole long house...\n" * 3, None),
        ("the bread of the house\n" * 6 + "the bread of the whole long house ...\n" * 3, "ellipsis_lines"),
        ("the of bread house " * 2 + "1234 5678", None),  # 8 of 10
        ("the of bread house " * 2 + "1234 5678 9012", "alphabetic_words"),
        ("a dog went home " * 5, "stop_words"),
        ("the dog went home " * 5, "stop_words"),  # however often, one is not two
        ('"The" dog, and (TO) nobody', None),
    ],
)
def test_quality_thresholds(text: str, rule: str | None) -> None:
    assert quality(text) == rule
