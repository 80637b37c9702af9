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
_RECENT = 1 << 16  # keys in a dictionary before they become a sorted run
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

    def find(self, keys: Numbers) -> list[int]:
        """Numbers of all documents with one of ``keys``, in order."""
        found: set[int] = set()
        for key in keys.tolist():
            found.update(self._recent.get(key, ()))
        for sorted_keys, documents in self._runs:
            places = np.searchsorted(sorted_keys, keys)
            inside = places < len(sorted_keys)
            for place, key in zip(places[inside].tolist(), keys[inside], strict=True):
                while place < len(sorted_keys) and sorted_keys[place] == key:
                    found.add(int(documents[place]))
                    place += 1
        return sorted(found)

    def add(self, keys: Numbers, document: int) -> None:
        for key in keys.tolist():
            self._recent.setdefault(key, []).append(document)
        self._count += len(keys)
        if self._count >= _RECENT:
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

    def find(self, digest: bytes, signature: Signature) -> Found | None:
        """The first document kept that is equal; else the most similar one at or above the threshold; else None."""
        best: Found | None = None
        for number in self._index.find(self._keys(digest, signature)):
            record = self._read(number, 1)[0]
            if record["digest"].tobytes() == digest:
                return Found(number)
            if not self._bands[0] or signature.min() == NO_SHINGLE:
                continue  # only the first half of the digest is the same
            similarity = float((record["signature"] == signature).mean())
            if similarity >= self.threshold and (best is None or similarity > (best.similarity or 0)):
                best = Found(number, similarity)
        return best

    def add(self, digest: bytes, signature: Signature) -> bytes:
        """Take it as kept; returns the record to append to the file."""
        self._index.add(self._keys(digest, signature), self.count)
        self.count += 1
        return digest + signature.astype("<u4").tobytes()

    def close(self) -> None:
        os.close(self._file)

    def _remember(self, records: np.ndarray) -> None:
        numbers = np.arange(self.count, self.count + len(records), dtype=np.uint32)
        texts = np.frombuffer(records["digest"].tobytes(), "<u8")[:: DIGEST_BYTES // 8].astype(np.uint64)
        self._index.add_run(texts, numbers)
        if self._bands[0]:
            worded = (records["signature"] != NO_SHINGLE).any(axis=1)
            keys = band_keys(records["signature"][worded], *self._bands)
            self._index.add_run(keys.ravel(), np.repeat(numbers[worded], self._bands[0]))
        self.count += len(records)

    def _keys(self, digest: bytes, signature: Signature) -> Numbers:
        text = np.frombuffer(digest[:8], "<u8").astype(np.uint64)
        if not self._bands[0] or signature.min() == NO_SHINGLE:
            return text
        return np.concatenate([text, band_keys(signature[None], *self._bands)[0]])

    def _read(self, first: int, count: int) -> np.ndarray:
        size = self.record_type.itemsize
        return np.frombuffer(os.pread(self._file, count * size, first * size), self.record_type)
