"""Examples as numbers, and the padded batches made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np

from mlm_cli.tasks.encoding import Row

if TYPE_CHECKING:
    import torch

IGNORED = -100  # a token that has no label, as torch's cross entropy and transformers have it


@dataclass(frozen=True)
class Features:
    """The units that training draws and evaluation scores: a text, a window of one, a pair, or a question's choices.

    Attributes:
        rows: every sequence, those of a unit one after another.
        pad_id: fills up short ones.
        targets: by name, arrays with one entry a unit (``labels``).
        token_labels: int64 [s] a row, ``IGNORED`` where there is none; they become the batch's ``labels``.
        starts: int64 [units + 1], the first row of each unit, where a unit has several; None: one each.
        answers: int64 [a] a row, what is to be written behind it, its end included; None: nothing is written.
        start_id: of answers that a decoder of its own writes, the id that it begins with; None: they follow their rows.
    """

    rows: tuple[Row, ...]
    pad_id: int
    targets: Mapping[str, np.ndarray] = field(default_factory=dict)
    token_labels: tuple[np.ndarray, ...] | None = None
    starts: np.ndarray | None = None
    answers: tuple[np.ndarray, ...] | None = None
    start_id: int | None = None

    def __len__(self) -> int:
        return len(self.rows) if self.starts is None else len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each unit's longest row and its answer, int64 [units]."""
        rows = np.array([len(row) for row in self.rows], dtype=np.int64)
        if self.answers is not None:
            return rows + np.array([len(answer) for answer in self.answers], dtype=np.int64)
        return rows if self.starts is None or not len(rows) else np.maximum.reduceat(rows, self.starts[:-1])

    def subset(self, units: Sequence[int]) -> Features:
        """Some of the units, in this order."""
        rows = [self._rows_of(unit) for unit in units]
        flat = [row for part in rows for row in part]
        return Features(
            rows=tuple(self.rows[row] for row in flat),
            pad_id=self.pad_id,
            targets={name: values[list(units)] for name, values in self.targets.items()},
            token_labels=None if self.token_labels is None else tuple(self.token_labels[row] for row in flat),
            starts=None if self.starts is None else np.cumsum([0, *map(len, rows)], dtype=np.int64),
            answers=None if self.answers is None else tuple(self.answers[row] for row in flat),
            start_id=self.start_id,
        )

    def digest(self) -> bytes:
        """SHA-256 of everything that training sees of them."""
        digest = sha256()
        for row in self.rows:
            digest.update(row.ids.tobytes() + row.types.tobytes() + b"|")
        for name, values in sorted(self.targets.items()):
            digest.update(name.encode() + values.tobytes())
        for labels in self.token_labels or ():
            digest.update(labels.tobytes() + b"|")
        digest.update(b"" if self.starts is None else self.starts.tobytes())
        if self.answers is not None:
            digest.update(str(self.start_id).encode())
        for answer in self.answers or ():
            digest.update(answer.tobytes() + b"|")
        return digest.digest()

    def _rows_of(self, unit: int) -> range:
        return range(unit, unit + 1) if self.starts is None else range(self.starts[unit], self.starts[unit + 1])


def collate(features: Features, units: Sequence[int]) -> dict[str, torch.Tensor]:
    """A batch padded on the right to its longest row.

    Returns:
        ``tokens``, ``token_types`` int64 [r, s], ``lengths`` int64 [r], ``sample_ids`` int64 [b], the targets [b, ...];
        with labels of tokens ``labels`` int64 [r, s]; with several rows a unit ``members`` int64 [b, most rows]: the
        rows of each unit in this batch, -1 where it has fewer.

        With answers ``labels``, ``loss_mask`` [b, s] (1 where there is a label). Behind their rows: ``tokens`` and
        ``lengths`` are of both. Of a decoder: ``decoder_tokens`` int64 [b, s_dec], and the labels and mask are its own.
    """
    arrays = _read(features, units) if features.answers is None else _written(features, units)
    arrays["sample_ids"] = np.array(units, dtype=np.int64)
    arrays |= {name: values[list(units)] for name, values in features.targets.items()}
    return _tensors(arrays)


def _read(features: Features, units: Sequence[int]) -> dict[str, np.ndarray]:
    of_units = [features._rows_of(unit) for unit in units]
    numbers = [row for rows in of_units for row in rows]
    rows = [features.rows[number] for number in numbers]
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    shape = (len(rows), int(lengths.max()))
    tokens, types = np.full(shape, features.pad_id, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for place, row in enumerate(rows):
        tokens[place, : len(row)], types[place, : len(row)] = row.ids, row.types
    arrays = {"tokens": tokens, "token_types": types, "lengths": lengths}
    if features.token_labels is not None:
        labels = np.full(shape, IGNORED, dtype=np.int64)
        for place, number in enumerate(numbers):
            labels[place, : lengths[place]] = features.token_labels[number]
        arrays["labels"] = labels
    if features.starts is not None:
        members, begin = np.full((len(units), max(map(len, of_units))), -1, dtype=np.int64), 0
        for place, mine in enumerate(of_units):
            members[place, : len(mine)] = np.arange(begin, begin + len(mine))
            begin += len(mine)
        arrays["members"] = members
    return arrays


def _written(features: Features, units: Sequence[int]) -> dict[str, np.ndarray]:
    assert features.answers is not None and features.starts is None
    rows, answers = [features.rows[unit].ids for unit in units], [features.answers[unit] for unit in units]
    # What is read while the answer is written: each of its tokens but the last, behind what comes before it.
    before = rows if features.start_id is None else [np.array([features.start_id])] * len(rows)
    read = [np.concatenate([first, answer[:-1]]) for first, answer in zip(before, answers, strict=True)]
    labels = [np.concatenate([np.zeros(len(f) - 1, np.int64), a]) for f, a in zip(before, answers, strict=True)]
    masks = [np.concatenate([np.zeros(len(f) - 1), np.ones(len(a))]) for f, a in zip(before, answers, strict=True)]
    arrays = {"labels": _padded(labels, 0), "loss_mask": _padded(masks, 0).astype(np.float32)}
    if features.start_id is not None:
        arrays["decoder_tokens"] = _padded(read, features.pad_id)
        read = rows
    arrays["tokens"] = _padded(read, features.pad_id)
    arrays["lengths"] = np.array([len(row) for row in read], dtype=np.int64)
    return arrays


def _padded(rows: Sequence[np.ndarray], fill: int) -> np.ndarray:
    """Rows of one type as one array [rows, longest], filled up on the right."""
    array = np.full((len(rows), max(map(len, rows))), fill, dtype=rows[0].dtype)
    for place, row in enumerate(rows):
        array[place, : len(row)] = row
    return array


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    import torch

    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
