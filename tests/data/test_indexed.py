"""The indexed data set: Megatron's bytes both ways, damage found on opening."""

from __future__ import annotations

import hashlib
import struct
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlm_cli.data.indexed import IndexedDataset, IndexedWriter, optimal_dtype, resolve_prefix
from mlm_cli.errors import DataError

CHECK_SHA256 = "d4ad98747b3ee2712b91d788d2074a8462fa1a0abac3d9e59da37fbfc7ee70fb"


def write(prefix: Path, documents: list[list[list[int]]], dtype: type = np.uint16) -> Path:
    writer = IndexedWriter(prefix, dtype)
    for sequences in documents:
        for sequence in sequences:
            writer.add_sequence(sequence)
        writer.end_document()
    writer.finish()
    return prefix


def test_check_vector(tmp_path: Path) -> None:
    write(tmp_path / "check", [[[1, 2, 3], [4]], [], [[5, 6]]])
    index = (tmp_path / "check.idx").read_bytes()
    assert len(index) == 102
    assert hashlib.sha256(index).hexdigest() == CHECK_SHA256
    assert (tmp_path / "check.bin").read_bytes() == struct.pack("<6H", 1, 2, 3, 4, 5, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["check.bin", "check.idx"]


@pytest.mark.parametrize("name", ["inputs", "targets"])
def test_megatron_written_pair_is_read_and_written_back(test_data: Path, tmp_path: Path, name: str) -> None:
    source = test_data / "reference/megatron_indexed" / f"ag_news_prompt_{name}_document"
    dataset = IndexedDataset(source)
    assert (dataset.num_documents, dataset.dtype, dataset.contiguous) == (100, np.int32, True)
    raw = np.fromfile(f"{source}.bin", np.int32)
    assert np.array_equal(np.concatenate([dataset.document(i) for i in range(100)]), raw)
    assert np.array_equal(dataset.tokens(5, 50), raw[5:50])
    write(tmp_path / "copy", [[dataset.document(i).tolist()] for i in range(100)], np.int32)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"copy.{suffix}").read_bytes() == Path(f"{source}.{suffix}").read_bytes()


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=9), max_size=4), max_size=12),
    wide=st.booleans(),
)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, documents, wide) -> None:
    prefix = write(tmp_path_factory.mktemp("any") / "x", documents, np.int32 if wide else np.uint16)
    dataset = IndexedDataset(prefix)
    sequences = [sequence for document in documents for sequence in document]
    assert dataset.num_documents == len(documents)
    assert [dataset.sequence(i).tolist() for i in range(dataset.num_sequences)] == sequences
    assert [dataset.document(i).tolist() for i in range(len(documents))] == [list(chain(*each)) for each in documents]
    flat = list(chain(*sequences))
    assert dataset.num_tokens == len(flat)
    assert dataset.tokens(0, len(flat)).tolist() == flat
    assert dataset.max_token() == max(flat, default=-1)
    dataset.close()


def test_dtype_border() -> None:
    assert optimal_dtype(65499) is np.uint16
    assert optimal_dtype(65500) is np.int32


def test_nothing_shows_before_the_end(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "x", np.uint16)
    writer.add_sequence([1])
    writer.end_document()
    assert not list(tmp_path.glob("x.bin")) and not list(tmp_path.glob("x.idx"))
    writer.abandon()
    assert not list(tmp_path.iterdir())


def test_not_one_stream(tmp_path: Path) -> None:
    """Sequences in another order than they lie: read one by one, refused as a stream."""
    write(tmp_path / "x", [[[1, 2], [3]]])
    content = bytearray((tmp_path / "x.idx").read_bytes())
    content[34:42] = struct.pack("<2i", 1, 2)
    content[42:58] = struct.pack("<2q", 4, 0)
    content[34:42], content[42:58] = struct.pack("<2i", 1, 3), struct.pack("<2q", 4, 0)
    (tmp_path / "x.idx").write_bytes(content)
    dataset = IndexedDataset(tmp_path / "x")
    assert not dataset.contiguous
    assert dataset.sequence(0).tolist() == [3]
    with pytest.raises(DataError, match="not one stream"):
        dataset.tokens(0, 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda idx, bin: (b"X" + idx[1:], bin), "bad magic"),
        (lambda idx, bin: (idx[:20], bin), "bad magic or too short"),
        (lambda idx, bin: (idx[:9] + struct.pack("<Q", 2) + idx[17:], bin), "version 2"),
        (lambda idx, bin: (idx[:17] + b"\x63" + idx[18:], bin), "dtype code 99"),
        (lambda idx, bin: (idx[:-8], bin), "should be 102 bytes.*but is 94"),
        (lambda idx, bin: (idx, bin[:-2]), "should be 12 bytes by its index, but is 10"),
        (lambda idx, bin: (idx, bin + b"\0\0"), "should be 12 bytes by its index, but is 14"),
        (lambda idx, bin: (idx[:-8] + struct.pack("<q", 2), bin), "document index runs from 0 to 2"),
    ],
)
def test_damage_is_found_on_opening(tmp_path: Path, damage, message: str) -> None:
    write(tmp_path / "x", [[[1, 2, 3], [4]], [], [[5, 6]]])
    idx, bin = damage((tmp_path / "x.idx").read_bytes(), (tmp_path / "x.bin").read_bytes())
    (tmp_path / "x.idx").write_bytes(idx)
    (tmp_path / "x.bin").write_bytes(bin)
    with pytest.raises(DataError, match=message):
        IndexedDataset(tmp_path / "x")


def test_prefixes(tmp_path: Path) -> None:
    pair = str(write(tmp_path / "wiki_text_document", [[[1]]]))
    for spelled in ("wiki", "wiki_text_document", "wiki_text_document.bin", "wiki_text_document.idx"):
        assert resolve_prefix(tmp_path / spelled) == pair
    other = str(write(tmp_path / "news_body_document", [[[1]]]))
    assert resolve_prefix(tmp_path / "news") == other
    write(tmp_path / "news_title_document", [[[1]]])
    with pytest.raises(DataError, match="could mean any of `news_body_document`, `news_title_document`"):
        resolve_prefix(tmp_path / "news")
    with pytest.raises(DataError, match="no indexed data set"):
        resolve_prefix(tmp_path / "none")
    (tmp_path / "half.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"half.bin` has no"):
        resolve_prefix(tmp_path / "half")
