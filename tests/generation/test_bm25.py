"""BM25 against its definition in float64, and the order of what is found."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlm_cli.generation.bm25 import BM25, best, terms

pytest.importorskip("bm25s")


def definition(texts: list[list[str]], query: list[str], k1: float, b: float) -> list[float]:
    """Kamphuis et al. 2020, table 1, "Lucene (accurate)", word for word of the query."""
    mean = sum(map(len, texts)) / len(texts)
    found = []
    for text in texts:
        counts, score = Counter(text), 0.0
        for word in query:
            df = sum(word in other for other in texts)
            idf = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
            if counts[word]:
                score += idf * counts[word] / (counts[word] + k1 * (1 - b + b * len(text) / mean))
        found.append(score)
    return found


@pytest.mark.parametrize(("k1", "b"), [(1.2, 0.75), (0.9, 0.4), (2.0, 0.0), (0.5, 1.0)])
def test_scores_are_those_of_the_definition(k1: float, b: float, tmp_path: Path) -> None:
    rng = random.Random(0)
    words = [f"w{n}" for n in range(30)]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 40))) for _ in range(60)] + ["-- !", "only"]
    index = BM25.of(texts, k1=k1, b=b)
    index.save(tmp_path / "kept")
    for found_by in (index, BM25.load(tmp_path / "kept", len(texts))):
        for query in ("w3 w7", "w1 w1 w2", "only w29 unknown", " ".join(words), "W3, W3!"):
            expected = definition([terms(one) for one in texts], terms(query), k1, b)
            found = found_by.search(query, len(texts))
            assert [number for number, _ in found] == [
                number for number in sorted(range(len(texts)), key=lambda n: -expected[n]) if expected[number] > 0
            ]
            np.testing.assert_allclose([score for _, score in found], [expected[n] for n, _ in found], rtol=3e-6)
            assert found_by.search(query, 3) == found[:3]


def test_what_no_passage_has_finds_nothing() -> None:
    index = BM25.of(["a b", "c"], k1=1.2, b=0.75)
    assert index.search("zebra", 3) == index.search("", 3) == index.search("?!", 3) == []
    assert index.can_ask("zebra") and not index.can_ask("?! -")
    assert [number for number, _ in index.search("c", 5)] == [1]
    assert BM25.of(["--", "!"], k1=1.2, b=0.75).search("a", 2) == []  # documents without a word


def test_equal_scores_come_in_order() -> None:
    scores = np.array([1, 3, 2, 3, 0, 2, 3], np.float32)
    for k in range(1, 9):
        assert best(scores, k) == sorted(enumerate(scores.tolist()), key=lambda pair: (-pair[1], pair[0]))[:k]
    assert best(scores, 9, above=1.0) == [(1, 3), (3, 3), (6, 3), (2, 2), (5, 2)]
    assert best(np.zeros(4, np.float32), 2, above=0.0) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't STOP, Straße—ﬁne!", ["don", "t", "stop", "strasse", "fine"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),  # marks belong to their letters
        ("東京2024年", ["東", "京", "2024", "年"]),
        ("état e\u0301tat", ["état", "état"]),
        ("a_b\x00c", ["a", "b", "c"]),
    ],
)
def test_terms(text: str, expected: list[str]) -> None:
    assert terms(text) == expected


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_an_index_of_other_passages_or_with_pickles_is_refused(tmp_path: Path) -> None:
    BM25.of(["a b", "c"], k1=1.2, b=0.75).save(tmp_path / "kept")
    with pytest.raises(ValueError, match="do not fit"):
        BM25.load(tmp_path / "kept", 3)
    [vocabulary] = (tmp_path / "kept").glob("vocab*.json")
    whole = vocabulary.read_text()
    vocabulary.write_text('{"a": 99}')
    with pytest.raises(ValueError, match="do not fit"):
        BM25.load(tmp_path / "kept", 2)
    vocabulary.write_text(whole)
    [data] = (tmp_path / "kept").glob("data*.npy")
    np.save(data, np.array([Trap(tmp_path / "sprung")], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        BM25.load(tmp_path / "kept", 2)
    assert not (tmp_path / "sprung").exists()
    np.load(data, allow_pickle=True)
    assert (tmp_path / "sprung").exists()  # what others would have run
