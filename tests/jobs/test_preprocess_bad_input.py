"""Bad input to `mlm preprocess`: one clear error, exit code 3, fast; or skipped, counted and listed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from mlm_cli.data.sidecar import load_sidecar
from mlm_cli.errors import DataError, UsageError
from tests.jobs.preprocess_runs import command, jsonl, preprocess, texts

GOOD = b'{"text": "good"}\n'
BAD_LINES = {
    "malformed": (b'{"text": \n', "malformed JSON: Expecting value at column"),
    "missing key": (b'{"txt": "a", "id": 1}\n', "no key `text` (it has `txt`, `id`)"),
    "invalid UTF-8": (b'{"text": "\xff\xfe"}\n', "invalid UTF-8 at byte 11 of the line"),
    "not text": (b'{"text": null}\n', "`text` is null, not text"),
    "number in list": (b'{"text": ["a", 5]}\n', "`text` is a number, not text"),
    "not an object": (b'["text"]\n', "an array, not an object"),
    "half a pair": (b'{"text": "\\ud83d"}\n', "half a surrogate pair"),
    "deep": (b'{"text": ' + b"[" * 100_000 + b"\n", "malformed JSON"),
    "long": (b'{"text": "' + b"x" * 1_100_000 + b'"}\n', "longer than 1 MiB"),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_lines(tmp_path: Path, kind: str, workers: int) -> None:
    line, message = BAD_LINES[kind]
    (tmp_path / "x.jsonl").write_bytes(GOOD + b"\n" + GOOD + line + GOOD * 2 + line + GOOD)
    with pytest.raises(DataError) as caught:
        preprocess(tmp_path / "x.jsonl", output=tmp_path / "x", workers=workers, max_line_mb=1)
    assert f"x.jsonl:4: {message}" in caught.value.message or message in caught.value.message
    assert "x.jsonl:4: " in caught.value.message and caught.value.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]  # nothing half-written is left
    summary = preprocess(
        tmp_path / "x.jsonl", output=tmp_path / "x", workers=workers, on_bad_line="skip", max_line_mb=1
    )
    assert (summary["documents"], summary["skipped"], summary["read"]) == (5, 2, 7)
    assert texts(tmp_path / "x") == ["good|"] * 5
    listed = [json.loads(entry) for entry in (tmp_path / "x.bad.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in listed] == [4, 7]
    assert all(message in entry["reason"] for entry in listed)
    sidecar = load_sidecar(tmp_path / "x")
    assert sidecar.bad_lines["count"] == 2 and sidecar.bad_lines["first"] == listed


@pytest.mark.parametrize("skip", [False, True])
def test_file_level_faults(tmp_path: Path, skip: bool) -> None:
    mode = "skip" if skip else "stop"
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "blank.jsonl").write_bytes(b"\n \n\n")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(GOOD * 5000)[:-20])
    (tmp_path / "noise.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "noise.parquet").write_bytes(b"not parquet")
    (tmp_path / "latin.txt").write_bytes("line\nétat".encode("latin-1"))
    for name, message in {
        "empty.jsonl": "the file is empty" if not skip else "no document",
        "blank.jsonl": "no document",
        "cut.jsonl.gz": "cut short or damaged",
        "noise.jsonl.gz": "cut short or damaged",
        "noise.parquet": "not a Parquet file",
        "latin.txt": "latin.txt:2: invalid UTF-8 at byte 6" if not skip else "no document",
        "missing.jsonl": "does not exist",
    }.items():
        for workers in (1, 2):
            with pytest.raises(DataError, match=message):
                preprocess(tmp_path / name, output=tmp_path / "out/x", workers=workers, on_bad_line=mode)
    assert not list(tmp_path.glob("out/*"))
    if skip:
        jsonl(tmp_path / "good.jsonl", ["good"])
        both = preprocess(tmp_path / "empty.jsonl", tmp_path / "good.jsonl", output=tmp_path / "x", on_bad_line="skip")
        assert (both["documents"], both["skipped"], both["read"]) == (1, 1, 2)


def test_parquet_without_the_column(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"no column `text` \(it has `body`, `id`\)"):
        preprocess(tmp_path / "x.parquet", output=tmp_path / "x")
    pq.write_table(pa.table({"text": ["a", None, "b"]}), tmp_path / "y.parquet")
    with pytest.raises(DataError, match=r"y.parquet:2: `text` is null"):
        preprocess(tmp_path / "y.parquet", output=tmp_path / "y")


def test_a_line_of_100_mb(tmp_path: Path) -> None:
    with (tmp_path / "x.jsonl").open("wb") as out:
        out.write(GOOD + b'{"text": "')
        for _ in range(100):
            out.write(b"many words " * 95_000)
        out.write(b'"}\n' + GOOD)
    done = command("preprocess", "x.jsonl", "--tokenizer", "bytes", "-o", "x", "--workers", "2", cwd=tmp_path)
    assert done.returncode == 3 and "x.jsonl:2: longer than 32 MiB" in done.stderr
    summary = preprocess(tmp_path / "x.jsonl", output=tmp_path / "x", on_bad_line="skip")
    assert (summary["documents"], summary["skipped"]) == (2, 1)


def test_commands_end_with_one_error_and_code_3(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(GOOD + b"{\n")
    jsonl(tmp_path / "good.jsonl", ["a"])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tokenizer.json").write_text("{")
    for inputs, tokenizer in (("bad.jsonl", "bytes"), ("none.jsonl", "bytes"), ("good.jsonl", "broken")):
        done = command("preprocess", inputs, "--tokenizer", tokenizer, "-o", "x", "-q", cwd=tmp_path)
        assert done.returncode == 3 and done.stdout == ""
        assert done.stderr.count("error: ") == 1 and "hint: " in done.stderr and "Traceback" not in done.stderr


def test_options_that_do_not_go_together(tmp_path: Path, test_data: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["a"])
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "tok").mkdir()
    tiny = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    (tmp_path / "tok/tokenizer.json").write_text(json.dumps(tiny))
    with pytest.raises(DataError, match="no end-of-document token"):
        preprocess(source, output=tmp_path / "x", tokenizer=str(tmp_path / "tok"))
    with pytest.raises(UsageError, match="plain text"):
        preprocess(tmp_path / "a.txt", output=tmp_path / "x", json_key=("body",))
    with pytest.raises(UsageError, match="twice"):
        preprocess(source, output=tmp_path / "x", json_key=("a", "a"))
    for arguments in (["a.jsonl", "--tokenizer", "bytes"], ["a.jsonl", "-o", "x"], ["--inspect", "x", "a.jsonl"]):
        assert command("preprocess", *arguments, cwd=tmp_path).returncode == 2


def test_one_array_is_told_apart_from_one_object_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n {"text": "a"}\n]\n')
    with pytest.raises(DataError, match=r"a\.json:1: malformed JSON: a file that is one array"):
        preprocess(tmp_path / "a.json", output=tmp_path / "x")


def test_a_text_too_long_for_one_document_names_the_ways_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a line\n" * 30_000)
    with pytest.raises(DataError, match=r"longer than 0\.1 MiB") as caught:
        preprocess(tmp_path / "a.txt", output=tmp_path / "x", max_line_mb=0.1)
    assert "--max-line-mb" in str(caught.value.hint) and "--txt-documents line" in str(caught.value.hint)


def test_nothing_good_names_the_first_bad_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n" + BAD_LINES["missing key"][0])
    with pytest.raises(DataError, match=r"all 1 were bad, the first at .*a\.jsonl:2: no key `text`"):
        preprocess(tmp_path / "a.jsonl", output=tmp_path / "x", on_bad_line="skip")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.jsonl", "-o", "sets/"], "`--output sets/` names a folder"),
        (["a.jsonl", "-o", "a.jsonl/x"], "cannot be made: Not a directory"),
        (["a.jsonl", "-o", "/proc/none/x"], "cannot be made"),
        (["a.jsonl", "-o", "x", "--max-line-mb", "nan"], "`--max-line-mb` must be a number above 0; it is nan"),
        (["a.jsonl", "-o", "x", "--documents", "2"], "without `--inspect` does not take `--documents`"),
        (["--inspect", "x", "-o", "y", "--workers", "2"], "does not take `--output`, `--workers`"),
        (["--merge", "x", "y", "-o", "z", "--split-sentences"], "`--merge` does not take `--split-sentences`"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    jsonl(tmp_path / "a.jsonl", ["a"])
    tokenizer = ["--tokenizer", "bytes"] if arguments[0] == "a.jsonl" else []
    done = command("preprocess", *arguments, *tokenizer, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stderr.count("error:") == 1 and [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
