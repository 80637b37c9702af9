"""Reading labelled files: every format, and every mistake named with its line."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest

from mlm_cli.errors import DataError
from mlm_cli.tasks.labelled_text import Columns, read_examples

ROWS = [('a "fine" film', "1"), ("dull , dull", "0"), ("ünïcode — ok", "1")]


def write(path: Path, content: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content.encode()))
    else:
        path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize("zipped", ["", ".gz"])
def test_all_formats_give_the_same_examples(tmp_path: Path, zipped: str) -> None:
    table = tmp_path / "c.csv"
    with table.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([("text", "label"), *ROWS])
    files = [
        (write(tmp_path / f"a.tsv{zipped}", "".join(f"{t}\t{y}\n" for t, y in ROWS)), Columns(0, 1)),
        (write(tmp_path / f"b.tsv{zipped}", "label\ttext\r\n" + "".join(f"{y}\t{t}\r\n" for t, y in ROWS)), Columns()),
        (write(tmp_path / f"c2.csv{zipped}", table.read_text()), Columns()),
        (
            write(
                tmp_path / f"d.jsonl{zipped}", "".join(json.dumps({"text": t, "label": int(y)}) + "\n" for t, y in ROWS)
            ),
            Columns(),
        ),
    ]
    for path, columns in files:
        assert [(example.text, example.label) for example in read_examples(path, columns)] == ROWS, path


def test_numbered_columns_below_a_header(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "quality\tid\tone\ttwo\n1\t7\tfirst\tsecond\n")
    (example,) = read_examples(path, Columns(2, 0, 3, header=True))
    assert (example.text, example.text_pair, example.label, example.where) == ("first", "second", "1", f"{path}:2")


def test_quoted_lines_keep_their_number(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,label\n"two\nlines",x\nplain,y\n')
    assert [example.where.rpartition(":")[2] for example in read_examples(path, Columns())] == ["2", "4"]


def test_real_pairs(test_data: Path) -> None:
    path = test_data / "finetune/mrpc/msr-para-train.tsv"
    examples = read_examples(path, Columns("#1 String", "Quality", "#2 String"))
    assert {example.label for example in examples} == {"0", "1"}
    assert len(examples) == len(path.read_text(encoding="utf-8-sig").splitlines()) - 1


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("a.tsv", "text\tlabel\nfine\t1\nno tab\n", Columns(), r"a\.tsv:3 has 1 columns, none with number 1"),
        (
            "a.tsv",
            "text\tlabel\nfine\t1\n",
            Columns("sentence"),
            r"a\.tsv:1 has no column `sentence`; found `text`, `label`",
        ),
        ("a.tsv", "fine\t1\n", Columns("text", 1, header=False), "task.header is false"),
        ("a.tsv", "text\tlabel\nfine\t \n", Columns(), r"a\.tsv:2 has no label"),
        ("a.csv", 'text,label\n"open,1\n', Columns(), r"a\.csv:2 is malformed"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "x"\n', Columns(), r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", '{"text": "x"}\n', Columns(), r"a\.jsonl:1 has no `label`; found `text`"),
        ("a.jsonl", "[1]\n", Columns(), r"a\.jsonl:1 has no `text`"),
        ("a.jsonl", '{"text": ["x"], "label": 1}\n', Columns(), r"a\.jsonl:1: `text` is \[\"x\"\]"),
        ("a.tsv", "", Columns(), "holds no examples"),
        ("a.txt", "x", Columns(), "read from .tsv, .csv or .jsonl"),
    ],
)
def test_mistakes_name_file_and_line(tmp_path: Path, name: str, content: str, columns: Columns, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_examples(write(tmp_path / name, content), columns)


def test_files_that_do_not_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_examples(tmp_path / "absent.tsv", Columns())
    (tmp_path / "bad.tsv").write_bytes(b"caf\xe9\t1\n")
    with pytest.raises(DataError, match="not UTF-8"):
        read_examples(tmp_path / "bad.tsv", Columns(0, 1))
    (tmp_path / "bad.tsv.gz").write_bytes(gzip.compress(b"x\t1\n" * 1000)[:-9])
    with pytest.raises(DataError, match="cannot read"):
        read_examples(tmp_path / "bad.tsv.gz", Columns(0, 1))
