"""Overlap with test sets against strings in a set, and what test files may look like."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
from pathlib import Path

import pytest

from mlm_cli.data.decontaminate import read_test_texts
from mlm_cli.data.ngrams import word_numbers, words_of
from mlm_cli.errors import DataError

TEXT = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def plain_ngrams(text: str, n: int) -> list[str]:
    words = re.findall(r"\w+", text.lower())
    return [" ".join(words[at : at + n]) for at in range(len(words) - n + 1)]


@pytest.mark.parametrize("n", [2, 5, 13])
def test_overlap_is_that_of_strings(tmp_path: Path, n: int) -> None:
    chance = random.Random(n)
    vocabulary = [f"Word{number}" for number in range(400)]
    texts = [" ".join(chance.choices(vocabulary, k=chance.randint(1, 30))) for _ in range(40)]
    for _ in range(60):  # some hold a run of words of a test text, just long enough or one word too short
        words, other = chance.choices(vocabulary, k=20), chance.choice(texts[:40]).split()
        start = chance.randint(0, max(0, len(other) - n))
        words[7:7] = other[start : start + n - chance.randint(0, 1)]
        texts.append(chance.choice([" ", ", "]).join(words).upper())
    files = []
    for number, part in enumerate((texts[:20], texts[20:40])):
        files.append(str(tmp_path / f"{number}.jsonl"))
        Path(files[-1]).write_text("".join(json.dumps({"q": text, "a": 3}) + "\n" for text in part))
    tests = read_test_texts(files, n)
    known = {gram for text in texts[:40] for gram in plain_ngrams(text, n)}
    assert len(tests.ngrams) == len(known)
    assert tests.short == sum(not plain_ngrams(text, n) for text in texts[:40]) > 0
    hits = 0
    for text in texts[40:]:
        shared = [gram for gram in plain_ngrams(text, n) if gram in known]
        words = words_of(text)
        found = tests.overlap(words, word_numbers(words))
        assert (found[0] if found else None) == (shared[0] if shared else None)
        if found:
            hits += 1
            first = any(found[0] in plain_ngrams(text, n) for text in texts[:20])
            assert found[1] == files[0 if first else 1]
    assert 5 < hits < 55


def test_kinds_of_test_files(tmp_path: Path) -> None:
    nested = {"data": [{"paragraphs": [{"context": TEXT, "qas": [{"question": "short", "id": 5}]}]}]}
    (tmp_path / "squad.json").write_text(json.dumps(nested, indent=1))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(json.dumps({"x": [TEXT]}).encode() + b"\n\n"))
    (tmp_path / "plain.tsv").write_text("0\t" + TEXT + "\n")
    for name, short in (("squad.json", 2), ("rows.jsonl.gz", 0), ("plain.tsv", 0)):
        tests = read_test_texts([str(tmp_path / name)], 13)
        words = words_of("Before: " + TEXT.title().replace(" ", ", ") + "! After.")
        assert tests.overlap(words, word_numbers(words)) == (" ".join(words[1:14]), str(tmp_path / name))
        assert tests.short == short - (name == "squad.json")
        assert tests.hashes == (hashlib.sha256((tmp_path / name).read_bytes()).hexdigest(),)
        assert tests.overlap(words[2:14], word_numbers(words[2:14])) is None  # twelve of them
        assert tests.overlap([], word_numbers([])) is None


def test_what_is_wrong_with_a_test_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "a"}\n{"q": \n')
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "c.txt").write_text("too short")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(TEXT.encode() * 100)[:-20])
    for name, message in (
        ("a.jsonl", r"a.jsonl:2: malformed JSON"),
        ("b.txt", "is not UTF-8"),
        ("c.txt", "has 13 words"),
        ("d.txt.gz", "cannot be read"),
        ("none.txt", "cannot be read: No such file"),
    ):
        with pytest.raises(DataError, match=message):
            read_test_texts([str(tmp_path / name)], 13)
