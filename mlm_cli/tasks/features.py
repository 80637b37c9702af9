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
    """

    rows: tuple[Row, ...]
    pad_id: int
    targets: Mapping[str, np.ndarray] = field(default_factory=dict)
    token_labels: tuple[np.ndarray, ...] | None = None
    starts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows) if self.starts is None else len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each unit's longest row, int64 [units]."""
        rows = np.array([len(row) for row in self.rows], dtype=np.int64)
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
        return digest.digest()

    def _rows_of(self, unit: int) -> range:
        return range(unit, unit + 1) if self.starts is None else range(self.starts[unit], self.starts[unit + 1])


def collate(features: Features, units: Sequence[int]) -> dict[str, torch.Tensor]:
    """A batch padded on the right to its longest row.

    Returns:
        ``tokens``, ``token_types`` int64 [r, s], ``lengths`` int64 [r], ``sample_ids`` int64 [b], the targets [b, ...];
        with labels of tokens ``labels`` int64 [r, s]; with several rows a unit ``members`` int64 [b, most rows]: the
        rows of each unit in this batch, -1 where it has fewer.
    """
    import torch

    of_units = [features._rows_of(unit) for unit in units]
    numbers = [row for rows in of_units for row in rows]
    rows = [features.rows[number] for number in numbers]
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    shape = (len(rows), int(lengths.max()))
    tokens, types = np.full(shape, features.pad_id, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for place, row in enumerate(rows):
        tokens[place, : len(row)], types[place, : len(row)] = row.ids, row.types
    arrays = {"tokens": tokens, "token_types": types, "lengths": lengths, "sample_ids": np.array(units, dtype=np.int64)}
    arrays |= {name: values[list(units)] for name, values in features.targets.items()}
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
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
