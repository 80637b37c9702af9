"""Documents written so far, by digest and signature: has this one been there before?

Records lie in a file that only grows, one for each document that was kept, so that a run which goes on after a kill
reads them and knows what it knew. In memory are keys alone: 12 bytes for each of a document's bands and for its text.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlm_cli.data.minhash import NO_SHINGLE, Signature, band_keys, bands_for
from mlm_cli.data.ngrams import Numbers

DIGEST_BYTES = 16
_RECENT = 1 << 17  # keys in a dictionary before they become a sorted run
_READ = 1 << 14  # records at a time, when a run is continued


@dataclass(frozen=True)
class Found:
    """An earlier document: its number among those kept; ``similarity`` is None for an equal text."""

    document: int
    similarity: float | None = None


class KeyIndex:
    """Keys -> the numbers of documents that have them: a dictionary of the newest, and sorted runs of all others.

    Runs grow by merging those of like size, so that there are few, and each key is moved only a few times.
    """

    def __init__(self) -> None:
        self._recent: dict[int, list[int]] = {}
        self._count = 0
        self._runs: list[tuple[Numbers, npt.NDArray[np.uint32]]] = []

    def in_runs(self, keys: list[Numbers]) -> list[set[int]]:
        """For each of many documents the numbers of those with one of its keys, but for what :meth:`recent` finds.

        Together, because a search in long runs waits for memory: keys in order share what it fetches.
        """
        if self._count >= _RECENT:
            self._store_recent()
        found: list[set[int]] = [set() for _ in keys]
        flat = np.concatenate([*keys, np.zeros(0, np.uint64)])
        order = np.argsort(flat)
        owners = np.repeat(np.arange(len(keys)), list(map(len, keys)))[order]
        wanted = flat[order]
        for sorted_keys, documents in self._runs:
            first = np.searchsorted(sorted_keys, wanted)
            hits = np.flatnonzero(sorted_keys[np.minimum(first, len(sorted_keys) - 1)] == wanted)
            last = np.searchsorted(sorted_keys, wanted[hits], side="right")
            for owner, start, stop in zip(owners[hits].tolist(), first[hits].tolist(), last.tolist(), strict=True):
                found[owner].update(documents[start:stop].tolist())
        return found

    def recent(self, keys: Numbers) -> set[int]:
        """Numbers of documents with one of ``keys``, of those added since the last :meth:`in_runs` and some before."""
        found: set[int] = set()
        for key in keys.tolist():
            found.update(self._recent.get(key, ()))
        return found

    def add(self, keys: Numbers, document: int) -> None:
        for key in keys.tolist():
            self._recent.setdefault(key, []).append(document)
        self._count += len(keys)

    def _store_recent(self) -> None:
        counts = [len(numbers) for numbers in self._recent.values()]
        recent = np.repeat(np.fromiter(self._recent, np.uint64, len(self._recent)), counts)
        self.add_run(recent, np.array([n for numbers in self._recent.values() for n in numbers], np.uint32))
        self._recent, self._count = {}, 0

    def add_run(self, keys: Numbers, documents: npt.NDArray[np.uint32]) -> None:
        """Many at once, in any order."""
        order = np.argsort(keys, kind="stable")
        self._runs.append((keys[order], documents[order]))
        while len(self._runs) > 1 and len(self._runs[-2][0]) <= 2 * len(self._runs[-1][0]):
            (keys, documents), (more_keys, more_documents) = self._runs[-2:]
            self._runs[-2:] = []
            keys, documents = np.concatenate([keys, more_keys]), np.concatenate([documents, more_documents])
            order = np.argsort(keys, kind="stable")
            self._runs.append((keys[order], documents[order]))


def document_keys(digests: bytes, signatures: Signature, bands: tuple[int, int]) -> list[Numbers]:
    """What to look documents up by: of each its text, and with a signature of any shingles, its bands too.

    Args:
        digests: of all d documents, one after the other. signatures: [d, num_permutations].
        bands: as of :func:`bands_for`; (0, 0) for equal texts alone.
    """
    texts = np.frombuffer(digests, "<u8").reshape(-1, DIGEST_BYTES // 8)[:, :1].astype(np.uint64)
    if not bands[0]:
        return list(texts)
    keys = np.concatenate([texts, band_keys(signatures, *bands)], axis=1)
    worded = (signatures != NO_SHINGLE).any(axis=1).tolist()
    return [row if any_shingle else row[:1] for row, any_shingle in zip(keys, worded, strict=True)]


class SeenDocuments:
    """What was kept, in order.

    Args:
        records: the file of records; what it holds up to ``size`` bytes is read. The caller appends what :meth:`add`
            returns before the next :meth:`find`.
        num_permutations: of signatures; 0 for equal texts alone.
    """

    def __init__(self, records: Path, size: int, *, num_permutations: int = 0, threshold: float = 0.8) -> None:
        self.record_type = np.dtype([("digest", f"V{DIGEST_BYTES}"), ("signature", "<u4", (num_permutations,))])
        self.threshold = threshold
        self._bands = bands_for(threshold, num_permutations) if num_permutations else (0, 0)
        self._index = KeyIndex()
        self._file = os.open(records, os.O_RDONLY)
        self.count = 0
        for _ in range(0, size, _READ * self.record_type.itemsize):
            self._remember(self._read(self.count, min(_READ, size // self.record_type.itemsize - self.count)))

    def look_up(self, keys: list[Numbers]) -> list[set[int]]:
        """Look for the keys of many documents at once; each answer goes to :meth:`find`, in order."""
        return self._index.in_runs(keys)

    def find(self, digest: bytes, signature: Signature, keys: Numbers, looked_up: set[int]) -> Found | None:
        """The document kept that is equal; else the most similar one at or above the threshold; else None."""
        best: Found | None = None
        for number in sorted(looked_up | self._index.recent(keys)):
            record = self._read(number, 1)[0]
            if record["digest"].tobytes() == digest:
                return Found(number)
            if len(keys) == 1:
                continue  # only the first half of the digest is the same
            similarity = float((record["signature"] == signature).mean())
            if similarity >= self.threshold and (best is None or similarity > (best.similarity or 0)):
                best = Found(number, similarity)
        return best

    def add(self, digest: bytes, signature: Signature, keys: Numbers) -> bytes:
        """Take it as kept; returns the record to append to the file."""
        self._index.add(keys, self.count)
        self.count += 1
        return digest + signature.astype("<u4").tobytes()

    def close(self) -> None:
        os.close(self._file)

    def _remember(self, records: np.ndarray) -> None:
        keys = document_keys(records["digest"].tobytes(), records["signature"], self._bands)
        numbers = np.arange(self.count, self.count + len(records), dtype=np.uint32)
        self._index.add_run(np.concatenate(keys), np.repeat(numbers, list(map(len, keys))))
        self.count += len(records)

    def _read(self, first: int, count: int) -> np.ndarray:
        size = self.record_type.itemsize
        return np.frombuffer(os.pread(self._file, count * size, first * size), self.record_type)
