"""Join finished sets into one, block by block: as if their documents had been written one after the other."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mlm_cli.data.indexed import Array, IndexedDataset, IndexedParts
from mlm_cli.errors import DataError

_BLOCK = 1 << 20  # sequences, documents, or 8-byte units of ids at a time


def merge_pairs(prefixes: Sequence[str], folder: Path, name: str) -> IndexedParts:
    """Write the pairs one after the other into ``folder/NAME.{bin,len,doc}``; the caller makes the index.

    Raises:
        DataError: a pair that does not open, or pairs of different dtypes.
    """
    parts: IndexedParts | None = None
    for prefix in prefixes:
        dataset = IndexedDataset(prefix)
        try:
            if parts is None:
                parts = IndexedParts(folder, name, dataset.dtype)
            if dataset.dtype != parts.dtype:
                raise DataError(
                    f"`{prefix}` holds {dataset.dtype} ids, `{prefixes[0]}` {parts.dtype}",
                    hint="sets made with one tokenizer have one dtype; make them again with the same",
                )
            _append(dataset, parts)
        finally:
            dataset.close()
    assert parts is not None
    return parts


def _append(dataset: IndexedDataset, parts: IndexedParts) -> None:
    none = np.zeros(0, np.int64)
    for tokens in _tokens(dataset):
        parts.append(tokens, none, none)
    base = parts.num_sequences
    for start in range(0, dataset.num_sequences, _BLOCK):
        parts.append(b"", dataset.lengths[start : start + _BLOCK], none)
    parts.num_sequences = base  # document ends are counted from where this set begins
    for start in range(0, dataset.num_documents, _BLOCK):
        ends = dataset.document_index[start : start + _BLOCK + 1]
        counts = np.diff(ends)
        parts.append(b"", none, counts)
        parts.num_sequences += int(counts.sum())


def _tokens(dataset: IndexedDataset) -> Iterator[Array]:
    if dataset.contiguous:
        step = 8 * _BLOCK // dataset.dtype.itemsize
        for start in range(0, dataset.num_tokens, step):
            yield dataset.tokens(start, start + step)
    else:
        for number in range(dataset.num_sequences):
            yield dataset.sequence(number)


def publish(parts: dict[str, IndexedParts], folder: Path, target: str) -> None:
    """Make the indexes and move everything under its final name, the indexes last."""
    for name, part in parts.items():
        part.sync()
        part.close()
        part.write_index(folder / f"{name}.idx")
    for name, part in parts.items():
        Path(f"{target}_{name}.idx").unlink(missing_ok=True)
        part.paths[0].replace(f"{target}_{name}.bin")
    # those of an older set of that name describe other files
    for suffix in (".json", ".origins.npy", ".bad.jsonl", ".removed.jsonl"):
        Path(target + suffix).unlink(missing_ok=True)
    if (folder / "sidecar.json").exists():
        (folder / "sidecar.json").replace(f"{target}.json")
    for name in parts:
        (folder / f"{name}.idx").replace(f"{target}_{name}.idx")
    shutil.rmtree(folder)
