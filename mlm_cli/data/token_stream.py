"""The documents of a split as one stream of tokens: what every kind of sample is cut from."""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

import numpy as np

from mlm_cli.data.indexed import IndexedDataset
from mlm_cli.errors import DataError


class TokenStore(Protocol):
    """What is needed of an indexed data set (``data.indexed.IndexedDataset``)."""

    prefix: str
    dtype: np.dtype[Any]
    num_documents: int
    offsets: np.ndarray
    document_index: np.ndarray

    @property
    def num_tokens(self) -> int: ...

    @property
    def one_stream(self) -> bool: ...

    def tokens(self, start: int, stop: int) -> np.ndarray: ...


def first_token_of_document(dataset: TokenStore, document: int) -> int:
    """Place of a document's first token in the ``.bin``, in tokens; ``num_documents`` gives the end of the data."""
    if document >= dataset.num_documents:
        return dataset.num_tokens
    sequence = int(dataset.document_index[document])
    if sequence >= len(dataset.offsets):  # trailing documents without any sequence
        return dataset.num_tokens
    return int(dataset.offsets[sequence]) // dataset.dtype.itemsize


class TokenStream:
    """Some documents of an indexed data set, one after the other; opened by a few reads at any size, and picklable.

    Args:
        dataset: the indexed tokens.
        documents: which documents; None: all.
        vocab_size: refuse token ids from here on.
        name: how errors call the data, e.g. ``valid split of data/wiki``.

    Attributes:
        start: place of the first token in the ``.bin``; num_tokens: how many there are.

    Raises:
        DataError: sequences that do not lie back to back.
    """

    def __init__(
        self, dataset: TokenStore, documents: range | None, *, vocab_size: int | None, name: str | None
    ) -> None:
        self.dataset = dataset
        self.documents = range(dataset.num_documents) if documents is None else documents
        self.vocab_size = vocab_size
        self.name = name or str(dataset.prefix)
        if not dataset.one_stream:
            raise DataError(
                f"the sequences of {dataset.prefix} do not lie back to back in its .bin file",
                hint="write it anew with `mlm preprocess`",
            )
        self.start = first_token_of_document(dataset, self.documents.start)
        self.num_tokens = first_token_of_document(dataset, self.documents.stop) - self.start

    def require(self, num_tokens: int, purpose: str, key: str | None = None) -> None:
        """Raise DataError unless there are ``num_tokens``; a smaller ``key`` of the recipe would need fewer."""
        if self.num_tokens < num_tokens:
            raise DataError(
                f"{self.name} holds {self.num_tokens:,} tokens in {len(self.documents):,} documents; {purpose} needs "
                f"{num_tokens:,}",
                hint=f"give more text or a larger share in data.split{f', or a smaller {key}' if key else ''}",
            )

    def read(self, first: int, stop: int) -> np.ndarray:
        """Tokens [first, stop) of the stream, int64; past its end it goes on at its beginning.

        Raises:
            DataError: a token id is not in the vocabulary.
        """
        parts = []
        place = first
        while place < stop:
            begin = place % self.num_tokens
            length = min(stop - place, self.num_tokens - begin)
            parts.append(self.dataset.tokens(self.start + begin, self.start + begin + length))
            place += length
        tokens = (np.concatenate(parts) if len(parts) > 1 else parts[0]).astype(np.int64)
        if self.vocab_size is not None and (largest := int(tokens.max())) >= self.vocab_size:
            raise DataError(
                f"{self.name}: token id {largest} near token {self.start + first:,} of {self.dataset.prefix}.bin is "
                f"not in the vocabulary of {self.vocab_size:,}",
                hint="the data was made with another tokenizer: run `mlm preprocess` with this one",
            )
        return tokens

    @property
    def settings(self) -> tuple[Any, ...]:
        """What decides the samples beside the tokens; subclasses give theirs."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """sha256 over what decides the samples: sizes, both ends of the tokens, documents, ``settings``.

        Constant time: the middle of a corpus is not read (the sidecar holds full hashes of its sources).
        """
        edge = min(self.num_tokens, 65_536)
        digest = hashlib.sha256()
        digest.update(self.dataset.tokens(self.start, self.start + edge).tobytes())
        end = self.start + self.num_tokens
        digest.update(self.dataset.tokens(end - edge, end).tobytes())
        sizes = (self.dataset.num_tokens, self.dataset.num_documents, self.documents.start, self.documents.stop)
        digest.update(repr((sizes, *self.settings)).encode())
        return digest.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes: a memory map does not travel, so its file is opened again there."""
        state = dict(self.__dict__)
        if isinstance(self.dataset, IndexedDataset):
            state["dataset"], state["reopen"] = None, self.dataset.prefix
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        prefix = state.pop("reopen", None)
        self.__dict__.update(state)
        if prefix is not None:
            self.dataset = IndexedDataset(prefix)
