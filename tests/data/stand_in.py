"""An indexed data set in memory, for tests of what is built on top of one."""

from __future__ import annotations

import numpy as np


class MemoryTokens:
    """Documents of one sequence each, laid out as in a ``.bin``/``.idx`` pair; picklable."""

    @classmethod
    def of_sentences(cls, documents: list[list[list[int]]], dtype: type = np.int32) -> MemoryTokens:
        """Documents of several sequences each, or of none."""
        made = cls([sentence for document in documents for sentence in document], dtype)
        made.num_documents = len(documents)
        made.document_index = np.cumsum([0, *map(len, documents)], dtype=np.int64)
        return made

    def __init__(self, documents: list[list[int]], dtype: type = np.uint16, prefix: str = "memory") -> None:
        self.prefix, self.dtype, self.one_stream = prefix, np.dtype(dtype), True
        lengths = np.array([len(document) for document in documents], dtype=np.int32)
        self.lengths = lengths
        self.offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[:-1] * self.dtype.itemsize
        self.document_index = np.arange(len(documents) + 1, dtype=np.int64)
        self.data = np.array([token for document in documents for token in document], dtype=dtype)
        self.num_documents, self.num_tokens = len(documents), len(self.data)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        return self.data[start:stop]
