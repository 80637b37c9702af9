"""Documents cut into passages: every word in its place, and every passage traced to file, line and character."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlm_cli.data.sources import find_sources
from mlm_cli.errors import DataError
from mlm_cli.generation.passages import Passages, cut, read_documents


@given(
    st.lists(st.tuples(st.sampled_from([" ", "\n", "\t\r\n ", "\u3000"]), st.text("aé🙂-.", min_size=1, max_size=3))),
    st.integers(1, 6),
    st.data(),
)
def test_passages_hold_the_words_they_should(parts: list[tuple[str, str]], words: int, data: st.DataObject) -> None:
    """Passage i is words [i * step, i * step + words), with all between them; none is left out."""
    overlap = data.draw(st.integers(0, words - 1))
    text, every = "".join(gap + word for gap, word in parts), [word for _, word in parts]
    spans, step = cut(text, words, overlap), words - overlap
    passages = [text[start:stop] for start, stop in spans]
    for number, passage in enumerate(passages):
        assert passage.split() == every[number * step : number * step + words]
        assert passage == passage.strip()
    new = [word for number, one in enumerate(passages) for word in one.split()[overlap if number else 0 :]]
    assert new == every
    assert all(len(one.split()) > overlap for one in passages[1:])  # none that only repeats


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n\t", []),
        ("one", ["one"]),
        ("東京は大きい。 It is", ["東京は", "大きい", "。 It is"]),  # characters are words where words are not spaced
        ("ภาษาไทย", ["ภาษ", "าไท", "ย"]),
        ("한국어 말 한다 hi", ["한국어 말 한다", "hi"]),
    ],
)
def test_words_of_all_scripts(text: str, expected: list[str]) -> None:
    assert [text[start:stop] for start, stop in cut(text, 3)] == expected


def make(folder: Path, *, words: int = 3, overlap: int = 0) -> Passages:
    return Passages.of(read_documents(find_sources([str(folder)]), "text"), words, overlap)


def test_a_passage_can_be_found_again_in_its_file(tmp_path: Path) -> None:
    lines = ["uno due tre\nquattro cinque", "sei ünd 七八"]
    (tmp_path / "a.jsonl").write_text("\n" + "\n\n".join(json.dumps({"text": one, "x": 1}) for one in lines))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": ["One.", "Two three."]}).encode()))
    text = "\ufeff\nfirst line here\n\nsecond 🙂 line\nlast\n"
    (tmp_path / "c.txt").write_text(text)
    found = [passage for passages in [make(tmp_path)] for passage in map(passages.__getitem__, range(len(passages)))]
    shown = [(Path(one.path).name, one.line, one.offset, one.text) for one in found]
    assert shown == [
        ("a.jsonl", 2, 0, "uno due tre"),
        ("a.jsonl", 2, 12, "quattro cinque"),
        ("a.jsonl", 4, 0, "sei ünd 七"),
        ("a.jsonl", 4, 9, "八"),
        ("b.jsonl.gz", 1, 0, "One. Two three."),
        ("c.txt", 2, 1, "first line here"),
        ("c.txt", 4, 18, "second 🙂 line"),
        ("c.txt", 5, 32, "last"),
    ]
    for one in found[5:]:
        assert text.removeprefix("\ufeff")[one.offset :].startswith(one.text)
        assert text.splitlines()[one.line - 1].startswith(one.text)
    assert list(make(tmp_path).texts()) == [one.text for one in found]


def test_a_table_is_read_too(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": ["a b", "c"], "n": [1, 2]}), tmp_path / "t.parquet")
    passages = make(tmp_path)
    assert [(passages[n].line, passages[n].text) for n in range(2)] == [(1, "a b"), (2, "c")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "fine"}\n\n{"text": \n', r"a.jsonl:3: malformed JSON"),
        ("a.jsonl", b'{"text": "fine"}\n{"body": "x"}\n', r"a.jsonl:2: no key `text` \(it has `body`\)"),
        ("a.jsonl", b'{"text": 3}\n', r"a.jsonl:1: `text` is a number"),
        ("a.txt", b"fine\nno\xff\n", r"a.txt:2: invalid UTF-8"),
        ("a.txt.gz", gzip.compress(b"one two", mtime=0)[:-9], r"cut short or damaged"),
        ("a.txt", b"", r"a.txt:1: the file is empty"),
        ("a.jsonl", b'{"text": " "}\n', r"hold no text"),
    ],
)
def test_bad_documents_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        make(tmp_path)


def test_lines_are_counted_over_the_pieces_of_a_long_file(tmp_path: Path) -> None:
    """A file is read in pieces of 2 MiB."""
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": "x" * 1000}) + "\n") * 5000 + "nonsense\n")
    with pytest.raises(DataError, match=r"a.jsonl:5001: malformed"):
        make(tmp_path)


@example([])
@given(st.lists(st.text(max_size=3)))
def test_arrays_that_are_no_passages_are_refused(texts: list[str]) -> None:
    data = "".join(texts).encode()
    ends = np.cumsum([len(one.encode()) for one in texts]).astype(np.int64)
    places = np.zeros((len(texts), 3), np.int64)
    raw = np.frombuffer(data, np.uint8)
    if texts:
        assert list(Passages(["f"], raw, ends, places).texts()) == texts
        for spoiled in ((raw, ends[:-1], places), (raw, ends.astype(np.float64), places), (raw, ends + 1, places)):
            with pytest.raises(ValueError):
                Passages(["f"], *spoiled)
    else:
        with pytest.raises(ValueError):
            Passages(["f"], raw, ends, places)
