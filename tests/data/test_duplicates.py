"""Near duplicates against sets of shingles compared pair by pair, and an index that must not matter."""

from __future__ import annotations

import random
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from mlm_cli.data.clean import digest
from mlm_cli.data.minhash import MinHash, band_keys, bands_for, shingles
from mlm_cli.data.ngrams import ngram_numbers, word_numbers, words_of
from mlm_cli.data.seen import KeyIndex, SeenDocuments, document_keys

PERMUTATIONS = 128


@cache
def plain_shingles(text: str, n: int = 5) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[at : at + n]) for at in range(max(1, len(words) - n + 1))}


def jaccard(one: str, other: str) -> float:
    first, second = plain_shingles(one), plain_shingles(other)
    return len(first & second) / len(first | second)


def planted(chance: random.Random, count: int) -> list[str]:
    """Random texts, and edited copies of earlier ones: from a word or two to half of all words."""
    vocabulary = ["".join(chance.choices("abcdefghijklmnop", k=5)) for _ in range(4000)]
    documents: list[str] = []
    for _ in range(count):
        if documents and chance.random() < 0.5:
            words = chance.choice(documents).split()
            for _ in range(int(len(words) * chance.choice([0.0, 0.002, 0.01, 0.02, 0.03, 0.05, 0.3]))):
                words[chance.randrange(len(words))] = chance.choice(vocabulary)
        else:
            words = chance.choices(vocabulary, k=chance.randint(100, 200))
        documents.append(" ".join(words))
    return documents


def signature(text: str, minhash: MinHash) -> np.ndarray:
    return minhash.signature(shingles(word_numbers(words_of(text)), 5))


def run(path: Path, documents: list[str], *, threshold: float, again_at: int = -1) -> list[tuple[int, float] | None]:
    """For each document, (the kept document it repeats, similarity); None where it is kept."""
    minhash = MinHash(PERMUTATIONS)
    path.touch()
    seen = SeenDocuments(path, 0, num_permutations=PERMUTATIONS, threshold=threshold)
    found: list[tuple[int, float] | None] = []
    kept: list[int] = []
    for number, text in enumerate(documents):
        if number == again_at:
            seen.close()
            seen = SeenDocuments(path, path.stat().st_size, num_permutations=PERMUTATIONS, threshold=threshold)
        made = signature(text, minhash)
        [keys] = document_keys(digest(text), made[None], bands_for(threshold, PERMUTATIONS))
        [looked_up] = seen.look_up([keys])
        earlier = seen.find(digest(text), made, keys, looked_up)
        if earlier is None:
            with path.open("ab") as out:
                out.write(seen.add(digest(text), made, keys))
            kept.append(number)
            found.append(None)
        else:
            found.append((kept[earlier.document], 1.0 if earlier.similarity is None else earlier.similarity))
    seen.close()
    return found


@pytest.mark.parametrize("threshold", [0.7, 0.8, 0.9])
def test_decisions_are_those_of_brute_force(tmp_path: Path, threshold: float) -> None:
    """Every pair that is clearly above the threshold is found, none that is clearly below; 3 deviations are clear."""
    documents = planted(random.Random(int(threshold * 100)), 300)
    found = run(tmp_path / "seen", documents, threshold=threshold)
    kept: list[int] = []
    clear = {"same": 0, "other": 0}
    margin = 3 * (threshold * (1 - threshold) / PERMUTATIONS) ** 0.5
    for number, text in enumerate(documents):
        similar = max((jaccard(text, documents[other]) for other in kept), default=0.0)
        if found[number] is None:
            assert similar < threshold + margin
            kept.append(number)
            clear["other"] += similar < threshold - margin
        else:
            of, estimate = found[number] or (0, 0.0)
            true = jaccard(text, documents[of])
            assert of in kept and true > threshold - margin and estimate == pytest.approx(true, abs=0.15)
            clear["same"] += similar > threshold + margin
    assert clear["same"] > 25 and clear["other"] > 100


def test_signatures_estimate_jaccard_without_bias() -> None:
    """1,000 pairs: the mean error is below what 4 standard errors allow, and errors spread as the binomial says."""
    chance = random.Random(3)
    minhash = MinHash(PERMUTATIONS)
    errors = []
    for _ in range(1000):
        pool = [chance.getrandbits(32) for _ in range(chance.randint(20, 200))]
        cut = sorted(chance.choices(range(len(pool) + 1), k=2))
        one, other = set(pool[: cut[1]]), set(pool[cut[0] :])
        if not one or not other:
            continue
        true = len(one & other) / len(one | other)
        first, second = (minhash.signature(np.array(sorted(some), np.uint64)) for some in (one, other))
        deviation = max(true * (1 - true) / PERMUTATIONS, 1e-9) ** 0.5
        errors.append((float((first == second).mean()) - true) / deviation)
    assert abs(np.mean(errors)) < 4 / len(errors) ** 0.5
    assert 0.9 < np.std(errors) < 1.1


def test_signatures_agree_with_datasketch() -> None:
    """Another library's estimates of the same pairs, from hash functions of its own, differ by chance alone."""
    datasketch = pytest.importorskip("datasketch")
    documents = planted(random.Random(8), 60)
    minhash = MinHash(PERMUTATIONS)
    ours, theirs = [], []
    for text in documents:
        ours.append(signature(text, minhash))
        other = datasketch.MinHash(num_perm=PERMUTATIONS)
        other.update_batch([" ".join(shingle).encode() for shingle in sorted(plain_shingles(text))])
        theirs.append(other)
    pairs = [(a, b) for a in range(60) for b in range(a) if jaccard(documents[a], documents[b]) > 0.2]
    assert len(pairs) > 15
    for a, b in pairs:
        true = jaccard(documents[a], documents[b])
        deviation = (true * (1 - true) / PERMUTATIONS) ** 0.5 + 0.01
        assert abs(float((ours[a] == ours[b]).mean()) - true) < 4 * deviation
        assert abs(theirs[a].jaccard(theirs[b]) - true) < 4 * deviation


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.95])
@pytest.mark.parametrize("permutations", [16, 64, 128, 256])
def test_bands_hardly_miss_at_the_threshold(threshold: float, permutations: int) -> None:
    bands, rows = bands_for(threshold, permutations)
    assert bands * rows <= permutations
    longer = permutations // (rows + 1)
    assert rows == 1 or 1 - (1 - threshold**rows) ** bands >= 0.99
    assert not longer or 1 - (1 - threshold ** (rows + 1)) ** longer < 0.99 or rows == permutations


def test_band_keys_are_equal_just_where_bands_are() -> None:
    rng = np.random.default_rng(4)
    signatures = rng.integers(0, 3, (60, 12)).astype(np.uint32)
    keys = band_keys(signatures, 4, 3)
    for a in range(60):
        for b in range(60):
            for band in range(4):
                piece = slice(3 * band, 3 * band + 3)
                assert (keys[a, band] == keys[b, band]) == bool((signatures[a, piece] == signatures[b, piece]).all())
    assert len(np.unique(keys[:, 0])) <= 27 and not set(keys[:, 0].tolist()) & set(keys[:, 1].tolist())


@pytest.mark.parametrize("again_at", [0, 1, 137, 299])
def test_a_run_that_goes_on_knows_what_it_knew(tmp_path: Path, again_at: int) -> None:
    documents = [
        *planted(random.Random(6), 290),
        "",
        "...",
        " ",
        "!",
        "one two",
        "One, two.",
        "",
        "one  two",
        "two one",
        ".",
    ]
    whole = run(tmp_path / "a", documents, threshold=0.8)
    assert run(tmp_path / "b", documents, threshold=0.8, again_at=again_at) == whole
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    # equal but for white space; equal in words; the rest have no words in common, or none at all
    assert whole[290:] == [None, None, (290, 1.0), None, None, (294, 1.0), (290, 1.0), (294, 1.0), None, None]


def test_key_index_is_a_dictionary_of_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlm_cli.data import seen

    monkeypatch.setattr(seen, "_RECENT", 50)  # so that keys move into runs, and runs into each other
    rng = np.random.default_rng(2)
    index, plain, document = KeyIndex(), {}, 0
    for _ in range(300):
        batch = [rng.integers(0, 2500, 7).astype(np.uint64) * np.uint64(0x1234567890ABCDEF) for _ in range(5)]
        stored = index.in_runs(batch)
        for keys, before in zip(batch, stored, strict=True):
            wanted = {number for key in keys.tolist() for number in plain.get(key, ())}
            assert before | index.recent(keys) == wanted
            index.add(keys, document)
            for key in keys.tolist():
                plain.setdefault(key, []).append(document)
            document += 1
    assert 1 < len(index._runs) < 12 and index.in_runs([]) == []


def test_words_and_their_numbers() -> None:
    assert words_of("Don't STOP: naïve 東京です x_1") == ["don", "t", "stop", "naïve", "東", "京", "で", "す", "x_1"]
    assert words_of("nai\u0308ve") == words_of("na\u00efve")
    first = word_numbers(["a", "b", "a"])
    assert first[0] == first[2] != first[1]
    assert first[0] == 3405396810240292928  # blake2b(b"a"), 8 bytes: a run may go on in another process
    ngrams = ngram_numbers(word_numbers(list("abcabcba")), 3)
    assert ngrams[0] == ngrams[3] and len(set(ngrams.tolist())) == 5
    assert not len(ngram_numbers(first, 4))
