"""Reading held-out text: formats, counts, and mistakes named with their place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from mlm_cli.data.indexed import IndexedWriter
from mlm_cli.data.sidecar import Sidecar
from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.errors import DataError
from mlm_cli.evaluation.documents import Document, open_documents

TEXTS = ["The first  text.\n", "", "Zweiter Text: größer", "日本語 の 文"]
TOKENIZER = load_tokenizer("bytes")


def summary(documents: list[Document]) -> list[tuple[str, int | None, int | None]]:
    return [(TOKENIZER.decode(document.ids.tolist()), document.words, document.bytes) for document in documents]


EXPECTED = [(text, len(text.split()), len(text.encode())) for text in TEXTS]


def write_jsonl(path: Path) -> str:
    lines = "\n".join(json.dumps({"text": text, "other": 1}) for text in TEXTS).encode() + b"\n\n"
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_document_a_line(tmp_path: Path, name: str) -> None:
    assert summary(open_documents([write_jsonl(tmp_path / name)], TOKENIZER)) == EXPECTED
    assert summary(open_documents([write_jsonl(tmp_path / name)], TOKENIZER, limit=2)) == EXPECTED[:2]


def test_zst(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(TEXTS[2].encode()))
    assert summary(open_documents([str(path)], TOKENIZER)) == [EXPECTED[2]]


def test_a_document_a_file_and_folders(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text(TEXTS[0])
    (tmp_path / "sub" / "c.txt.gz").write_bytes(gzip.compress(TEXTS[2].encode()))
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    assert summary(open_documents([str(tmp_path)], TOKENIZER)) == [EXPECTED[0], EXPECTED[2]]
    source = tmp_path / "named.py"
    source.write_text(TEXTS[3])
    paths = [str(source), str(tmp_path / "b.txt")]
    assert summary(open_documents(paths, TOKENIZER)) == [EXPECTED[3], EXPECTED[0]]


@pytest.mark.parametrize("eod", [True, False])
def test_an_indexed_set_is_its_texts(tmp_path: Path, eod: bool) -> None:
    writer = IndexedWriter(tmp_path / "held_text_document", np.uint16)
    end = [TOKENIZER.eod_id] if eod and TOKENIZER.eod_id is not None else []
    for text in TEXTS:
        writer.add_sequence(np.array(TOKENIZER.encode(text) + end, dtype=np.uint16))
        writer.end_document()
    writer.finish()
    assert summary(open_documents([str(tmp_path / "held")], TOKENIZER)) == EXPECTED
    without = open_documents([str(tmp_path / "held")], None, limit=1)
    assert without[0].words is None and without[0].bytes is None
    (tmp_path / "held.json").write_text(Sidecar("00" * 32, "gpt2", 99, None, True, 4, []).text())
    with pytest.raises(DataError, match=r"made with another tokenizer \(gpt2\)"):
        open_documents([str(tmp_path / "held")], TOKENIZER)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl:1 has no text under the key `text`"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', r"a\.jsonl:1 is not UTF-8: byte 0xe9"),
        ("a.txt", b"ok caf\xe9", r"a\.txt is not UTF-8: byte 0xe9 at 6"),
        ("a.txt", b"", "no text to score"),
        ("a.txt.gz", b"\x1f\x8b\x08\x00broken", "cannot be read"),
        ("a.txt.zst", b"not zstd", "cannot be read"),
        ("a.parquet", b"PAR1", "tables are not scored"),
    ],
)
def test_mistakes(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_documents([str(tmp_path / name)], TOKENIZER)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file"):
        open_documents([str(tmp_path / "absent.txt")], TOKENIZER)
    with pytest.raises(DataError, match="neither a file, a folder nor an indexed data set"):
        open_documents([str(tmp_path / "absent")], TOKENIZER)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no text files"):
        open_documents([str(tmp_path / "empty")], TOKENIZER)
