"""Cutting inputs: every byte once, at line ends, hashed, whatever the packing and wherever a run continues."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlm_cli.data.chunks import Chunker
from mlm_cli.data.parse import parse_segment
from mlm_cli.data.segment import Segment, read_segment
from mlm_cli.data.sources import Source, find_sources
from mlm_cli.errors import DataError, UsageError

LIMIT = 64


def cut(path: Path, spool: Path, start: int = 0, packed: str | None = None) -> list[Segment]:
    spool.mkdir(exist_ok=True)
    info = path.stat()
    source = Source(str(path), "jsonl", packed, info.st_size, info.st_mtime_ns)
    chunker = Chunker(("text",), "file", spool, chunk_bytes=40, max_line=LIMIT)
    return list(chunker.segments(0, source, start))


@settings(max_examples=120, deadline=None)
@given(
    lines=st.lists(st.integers(0, 150), max_size=12),
    ended=st.booleans(),
    packed=st.sampled_from([None, "gz"]),
    data=st.data(),
)
def test_segments_are_the_file(tmp_path_factory: pytest.TempPathFactory, lines, ended, packed, data) -> None:
    folder = tmp_path_factory.mktemp("cut")
    whole = b"\n".join(bytes([97 + i % 26]) * size for i, size in enumerate(lines))
    whole += b"\n" if ended and whole else b""
    stored = gzip.compress(whole) if packed else whole
    path = folder / "x.jsonl"
    path.write_bytes(stored)
    segments = cut(path, folder / "spool", packed=packed)
    assert segments[-1].last and not any(segment.last for segment in segments[:-1])
    assert segments[-1].sha256 == hashlib.sha256(stored).hexdigest()
    assert segments[-1].consumed == len(stored)
    if not whole:
        assert [segment.mode for segment in segments] == ["empty"]
        return
    expected = whole.removesuffix(b"\n").split(b"\n")
    assert lines_of(segments, whole) == [line if len(line) <= LIMIT else None for line in expected]
    assert segments[-1].resume == len(whole)
    # from any border on, the rest comes out the same, though perhaps cut elsewhere
    border = data.draw(st.integers(0, len(segments) - 1))
    rest = cut(path, folder / "again", segments[border].resume, packed)
    if border == len(segments) - 1:
        assert [segment.mode for segment in rest] == ["end"]
    else:
        assert lines_of(rest, whole) == lines_of(segments[border + 1 :], whole)
    assert rest[-1].sha256 == segments[-1].sha256


def lines_of(segments: list[Segment], whole: bytes) -> list[bytes | None]:
    """Lines of segments, None for one over the limit; each segment must be whole lines, and exactly its bytes."""
    found: list[bytes | None] = []
    for segment in segments:
        if segment.mode == "long":
            found.append(None)
        else:
            content = read_segment(segment)
            assert content == whole[segment.resume - len(content) : segment.resume]
            assert content.endswith(b"\n") or segment.last
            found += content.removesuffix(b"\n").split(b"\n")
    return found


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    (segment,) = cut(tmp_path / "x.jsonl", tmp_path / "spool")
    parsed = parse_segment(segment, ("text",), 1 << 20)
    assert parsed.documents == {"text": ["a"]} and not parsed.bad


def test_kinds_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.txt", "c/d.parquet", "c/e.json.gz", "c/f.txt.zst", "skip.csv", ".hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = [(source.path, source.format, source.packed) for source in find_sources(["."])]
    assert found == [
        ("a.txt", "txt", None),
        ("b.jsonl", "jsonl", None),
        ("c/d.parquet", "parquet", None),
        ("c/e.json.gz", "jsonl", "gz"),
        ("c/f.txt.zst", "txt", "zst"),
    ]
    assert [source.path for source in find_sources(["c/*.gz", "a.txt"])] == ["c/e.json.gz", "a.txt"]
    assert [source.format for source in find_sources(["skip.csv"], "txt")] == ["txt"]
    assert find_sources(["-"])[0].is_stream
    assert find_sources(["hf://owner/name:test", "owner/name"])[1].path == "hf://owner/name"
    for named, message in {
        "missing.jsonl": "does not exist",
        "c/missing": "does not exist",
        "*.nope": "matches no file",
        "skip.csv": "unknown format",
    }.items():
        with pytest.raises(DataError, match=message):
            find_sources([named])
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="no file to read"):
        find_sources(["void"])
    with pytest.raises(UsageError):
        find_sources([])
    with pytest.raises(UsageError):
        find_sources(["-", "-"])
