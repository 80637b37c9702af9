"""Masking against its definition: plain-Python code with the same draws, and Megatron's algorithm with its own."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from mlm_cli.data.masking import Masking, budget
from mlm_cli.data.order import mix
from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.data.words import Words, words_of

VOCAB, CLS, SEP, MASK = 1000, 1, 2, 3
REPLACEMENTS = np.arange(10, VOCAB)
CONTINUES = np.arange(VOCAB) % 5 == 4  # a fifth of the vocabulary goes on with the word before it
WORDS = Words(CONTINUES, np.zeros(VOCAB, bool))


def masking(probability: float = 0.15, max_ngram: int = 3) -> Masking:
    return Masking(WORDS, MASK, REPLACEMENTS, probability=probability, max_ngram=max_ngram)


def pair(key: int, length: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    rng = np.random.default_rng(key)
    cut = int(rng.integers(2, length - 2))
    tokens = rng.integers(10, VOCAB, length)
    tokens[0], tokens[cut], tokens[-1] = CLS, SEP, SEP
    return tokens, [(1, cut), (cut + 1, length - 1)]


def words_in(tokens: np.ndarray, texts: list[tuple[int, int]]) -> list[list[list[int]]]:
    """Of each text its words, as lists of places."""
    found = []
    for begin, end in texts:
        words: list[list[int]] = []
        for place in range(begin, end):
            if words and CONTINUES[tokens[place]]:
                words[-1].append(place)
            else:
                words.append([place])
        found.append(words)
    return found


def plainly(tokens: np.ndarray, texts: list[tuple[int, int]], key: int, probability: float, longest: int):
    """The definition in lists and sets, one step at a time, with the same random numbers; (tokens, positions)."""
    words = [(word, text[at:]) for text in words_in(tokens, texts) for at, word in enumerate(text)]
    num, length = len(words), len(tokens)
    random = [mix((key + i * 0x9E3779B97F4A7C15) % 2**64) for i in range(2 * num + 2 * length)]
    limit = max(1, int(length * probability + 0.5))
    masked: set[int] = set()
    for number in sorted(range(num), key=random.__getitem__):
        following = words[number][1][:longest]
        weights = [1 / n for n in range(1, len(following) + 1)]
        chance, size = (random[num + number] >> 11) / 2**53, 1
        while size < len(following) and chance >= sum(weights[:size]) / sum(weights):
            size += 1
        places = [place for word in following[:size] for place in word]
        while size and len(masked) + len(places) > limit:
            size -= 1
            places = [place for word in following[:size] for place in word]
        if places and not masked & set(places):
            masked |= set(places)
    changed = tokens.copy()
    for number, place in enumerate(sorted(masked)):
        dice = (random[2 * num + number] >> 11) / 2**53
        if dice < 0.8:
            changed[place] = MASK
        elif dice < 0.9:
            changed[place] = REPLACEMENTS[random[2 * num + length + number] % len(REPLACEMENTS)]
    return changed, sorted(masked)


@pytest.mark.parametrize(("probability", "longest"), [(0.15, 3), (0.15, 1), (0.5, 5), (0.01, 3)])
def test_equal_to_the_definition_in_plain_python(probability: float, longest: int) -> None:
    mask = masking(probability, longest)
    for key in range(120):
        tokens, texts = pair(key, 5 + key)
        found = mask(tokens, texts, key * 977)
        changed, positions = plainly(tokens, texts, key * 977, probability, longest)
        assert found.positions.tolist() == positions
        assert np.array_equal(found.tokens, changed) and np.array_equal(found.labels, tokens[positions])


def megatrons(words: list[list[int]], num_tokens: int, rng: np.random.Generator) -> list[int]:
    """The choice of ``create_masked_lm_predictions`` of Megatron-LM (1/n, whole words) for one text."""
    num_to_predict = max(1, round(num_tokens * 0.15))
    ngrams = np.arange(1, 4)
    chances = 1.0 / ngrams
    sets = [[words[at : at + n] for n in ngrams] for at in range(len(words))]
    rng.shuffle(sets)
    covered: set[int] = set()
    for candidates in sets:
        if len(covered) >= num_to_predict:
            break
        usable = chances[: len(candidates)] / chances[: len(candidates)].sum()
        n = int(rng.choice(ngrams[: len(candidates)], p=usable))
        places = list(chain(*candidates[n - 1]))
        n -= 1
        while len(covered) + len(places) > num_to_predict and n > 0:
            places = list(chain(*candidates[n - 1]))
            n -= 1
        if len(covered) + len(places) > num_to_predict or covered & set(places):
            continue
        covered |= set(places)
    return sorted(covered)


def runs_of_words(words: list[list[int]], chosen: set[int]) -> list[int]:
    """Sizes, in words, of the unbroken runs of masked words."""
    sizes, open_run = [], 0
    for word in words:
        assert chosen.issuperset(word) or not chosen & set(word)  # whole words
        if chosen & set(word):
            open_run += 1
        elif open_run:
            sizes.append(open_run)
            open_run = 0
    return [*sizes, open_run] if open_run else sizes


def compare_with_megatron(num: int) -> None:
    mask, rng = masking(), np.random.default_rng(5)
    ours, theirs = Counter(), Counter()
    share = np.zeros((2, 8))  # by place in the text, in eighths
    tokens_masked = np.zeros(2)
    for key in range(num):
        tokens = np.random.default_rng(key % 200).integers(10, VOCAB, 128)
        tokens[0], tokens[-1] = CLS, SEP
        (words,) = words_in(tokens, [(1, 127)])
        found = mask(tokens, [(1, 127)], mix(key)).positions
        reference = megatrons(words, 128, rng)
        ours.update(runs_of_words(words, set(found.tolist())))
        theirs.update(runs_of_words(words, set(reference)))
        for row, places in enumerate((found, np.array(reference))):
            tokens_masked[row] += len(places)
            share[row] += np.bincount(places * 8 // 128, minlength=8)
    assert tokens_masked[0] == pytest.approx(tokens_masked[1], rel=2e-3)
    for size in (1, 2, 3, 4):  # 5 standard errors of a difference of counts
        assert abs(ours[size] - theirs[size]) < 5 * np.sqrt(ours[size] + theirs[size]), (size, ours, theirs)
    assert (np.abs(share[0] - share[1]) < 6 * np.sqrt(share.sum(axis=0))).all(), share


def test_chooses_as_megatron_does() -> None:
    compare_with_megatron(1500)


@pytest.mark.slow
def test_chooses_as_megatron_does_on_100_000_samples() -> None:
    compare_with_megatron(100_000)


def check_shares(num: int) -> None:
    """80 % mask, 10 % random, 10 % as they were, and the budget spent."""
    mask, counts, spent, wanted = masking(), np.zeros(3), 0, 0
    new = np.zeros(VOCAB, dtype=np.int64)
    for key in range(num):
        tokens, texts = pair(key % 500, 128)
        found = mask(tokens, texts, mix(key))
        now = found.tokens[found.positions]
        counts += [(now == MASK).sum(), ((now != MASK) & (now != found.labels)).sum(), (now == found.labels).sum()]
        np.add.at(new, now[(now != MASK) & (now != found.labels)], 1)
        spent, wanted = spent + len(found.positions), wanted + budget(128, 0.15)
        untouched = np.delete(np.arange(128), found.positions)
        assert np.array_equal(found.tokens[untouched], tokens[untouched])
        assert len(found.positions) <= 19 and not {0, 127} & set(found.positions.tolist())
    assert spent == pytest.approx(wanted, rel=1e-3)
    random = 0.1 * (1 - 1 / len(REPLACEMENTS))  # a random token may be the one that was there
    for count, share in zip(counts, (0.8, random, 0.2 - random), strict=True):
        assert abs(count - share * spent) < 5 * np.sqrt(share * (1 - share) * spent), counts
    assert new[:10].sum() == 0  # never a special token, and the others evenly
    expected = counts[1] / len(REPLACEMENTS)
    assert ((new[10:] - expected) ** 2 / expected).sum() < len(REPLACEMENTS) + 6 * np.sqrt(2 * len(REPLACEMENTS))


def test_shares_of_what_stands_there_instead() -> None:
    check_shares(4000)


@pytest.mark.slow
def test_shares_on_100_000_samples() -> None:
    check_shares(100_000)


def ngram_sizes(num: int, longest: int) -> np.ndarray:
    """Sizes of the n-grams drawn where nothing limits them: one n-gram in a long text of single-token words."""
    mask = Masking(
        Words(np.zeros(VOCAB, bool), np.zeros(VOCAB, bool)), MASK, REPLACEMENTS, probability=0.2, max_ngram=longest
    )
    room = np.full(num, longest)
    return mask._ngrams(room, np.random.default_rng(0).random(num))


def test_ngrams_are_drawn_with_probability_one_over_n() -> None:
    num = 100_000
    sizes = ngram_sizes(num, 3)
    for n, share in ((1, 6 / 11), (2, 3 / 11), (3, 2 / 11)):
        assert abs((sizes == n).sum() - share * num) < 5 * np.sqrt(share * (1 - share) * num)


def test_same_key_same_masks_other_key_others() -> None:
    tokens, texts = pair(1, 100)
    mask = masking()
    assert np.array_equal(mask(tokens, texts, 7).tokens, mask(tokens, texts, 7).tokens)
    assert not np.array_equal(mask(tokens, texts, 7).positions, mask(tokens, texts, 8).positions)


def test_texts_with_nothing_to_hide() -> None:
    empty = masking()(np.array([CLS, SEP]), [(1, 1)], 5)
    assert len(empty.positions) == 0 and empty.tokens.tolist() == [CLS, SEP]
    one = masking()(np.array([CLS, 50, SEP]), [(1, 2)], 5)
    assert one.positions.tolist() == [1] and one.labels.tolist() == [50]


def split_words(spec: str, text: str) -> list[str]:
    tokenizer = load_tokenizer(spec)
    ids = np.array(tokenizer.encode(text))
    starts = np.flatnonzero(words_of(tokenizer).starts(ids)).tolist()
    groups = [ids[a:b] for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
    return [tokenizer.decode_bytes(group).decode("utf-8", "replace") for group in groups]


def test_words_of_a_wordpiece_vocabulary(test_data: Path) -> None:
    """BERT's own rule: `##` goes on. Words are what BERT's pre-tokenizer cut before pieces were made."""
    tokenizer = load_tokenizer(str(test_data / "tokenizers/bert-base-uncased"))
    text = "However (unlikely), antidisestablishmentarianism isn't re-opened at 3.14! 日本"
    encoding = tokenizer.reference.encode(text, add_special_tokens=False)
    starts = words_of(tokenizer).starts(np.array(encoding.ids))
    expected = [at == 0 or encoding.word_ids[at] != encoding.word_ids[at - 1] for at in range(len(encoding.ids))]
    assert starts.tolist() == expected
    assert any(not start for start in starts)


def test_words_of_byte_level_and_sentencepiece_vocabularies(test_data: Path) -> None:
    text = "However (unlikely), antidisestablishmentarianism re-opened naïve 3!\nΈλα Привет."
    expected = ["However", " (", "unlikely", ")", ",", " antidisestablishmentarianism", " re", "-", "opened", " naïve"]
    expected += [" 3", "!", "\n", "Έλα", " Привет", "."]
    assert split_words("bytes", text) == [*expected[:1], " ", "(", *expected[2:]]
    expected[3:5] = ["),"]  # one token of GPT-2's
    assert split_words(str(test_data / "tokenizers/gpt2"), text) == expected
    spm = split_words(str(test_data / "tokenizers/sentencepiece/test_model.model"), "I saw a girl (with) telescopes.")
    assert spm == [" I", " saw", " a", " girl", " (", "with", ")", " telescopes", "."]


def test_scripts_without_spaces_have_no_long_words(test_data: Path) -> None:
    for name in ("jpn", "cmn_hans", "tha"):
        text = (test_data / f"corpora/multilingual/udhr2/{name}.txt").read_text(encoding="utf-8-sig")[2000:4000]
        words = split_words(str(test_data / "tokenizers/gpt2"), text)
        assert max(map(len, words)) < 12, max(words, key=len)
        assert "".join(words) == text
