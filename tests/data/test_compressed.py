"""Compressed input: the same bytes however it was packed, and damage never passes for a short text."""

from __future__ import annotations

import gzip
import random
import tracemalloc
from pathlib import Path

import pytest

from mlm_cli.data.compressed import open_unpacked
from mlm_cli.errors import DataError
from tests.jobs.preprocess_runs import preprocess

RANDOM = random.Random(1)
LINES = b"".join(b'{"text": "%020x"}\n' % RANDOM.getrandbits(80) for _ in range(20_000))


def packed(path: Path, *pieces: bytes) -> bytes:
    if path.suffix == ".gz":
        return b"".join(gzip.compress(piece) for piece in pieces)
    zstandard = pytest.importorskip("zstandard")
    return b"".join(zstandard.compress(piece) for piece in pieces)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_frames_follow_each_other(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(packed(path, LINES[:100], b"", LINES[100:200_000], LINES[200_000:]))
    with open_unpacked(path) as stream:
        assert stream.read() == LINES
    with open_unpacked(path) as stream:
        assert b"".join(stream) == LINES


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("kept", [0.0002, 0.5, 0.9999])
def test_a_cut_file_is_an_error(tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"a.jsonl.{suffix}"
    whole = packed(path, LINES[:1000], LINES[1000:])
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(EOFError), open_unpacked(path) as stream:
        stream.read()
    for mode in ("stop", "skip"):
        with pytest.raises(DataError, match="cut short or damaged"):
            preprocess(path, output=tmp_path / "x", on_bad_line=mode)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_what_unpacks_to_much_does_not_fill_memory(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "zeros.zst"
    path.write_bytes(zstandard.compress(bytes(1 << 28)))
    with open_unpacked(path) as stream:
        tracemalloc.start()
        assert sum(len(block) for block in iter(lambda: stream.read(1 << 20), b"")) == 1 << 28
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
        tracemalloc.stop()
