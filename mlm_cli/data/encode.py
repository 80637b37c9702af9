"""Documents -> ids and lengths, as Megatron's ``preprocess_data.py`` lays them out. Runs in the workers.

A text that gives no token gives no sequence; a document without any token is kept as an empty document and gets no
end-of-document id; otherwise that id closes the document's last sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlm_cli.data.clean import Cleaner, Cleaning
from mlm_cli.data.parse import Document, parse_segment
from mlm_cli.data.segment import Segment
from mlm_cli.data.sentences import split_sentences
from mlm_cli.data.tokenizer_backends import Encoder, Ids


@dataclass(frozen=True)
class EncodeSettings:
    """What a worker needs to know. ``eod`` is None for no end-of-document id."""

    keys: tuple[str, ...]
    dtype: str
    eod: int | None
    split_sentences: bool
    max_line: int
    cleaner: Cleaner | None = None


@dataclass
class Encoded:
    """Whole documents of one key: all ids, i32 tokens per sequence, i64 sequences per document.

    ``characters`` of each document's text, i64, and ``text_tokens`` all gave, without end-of-document ids.
    """

    tokens: Ids
    lengths: npt.NDArray[np.int32]
    sequences: npt.NDArray[np.int64]
    max_token: int
    characters: npt.NDArray[np.int64]
    text_tokens: int

    def keep(self, keep: npt.NDArray[np.bool_], *, eod: bool) -> Encoded:
        """The documents where ``keep`` [documents] is true; ``eod``: whether each ends with an id of its own."""
        of_sequences = np.repeat(keep, self.sequences)
        tokens = self.tokens[np.repeat(of_sequences, self.lengths)]
        sequences = self.sequences[keep]
        text_tokens = len(tokens) - (int((sequences > 0).sum()) if eod else 0)
        lengths, characters = self.lengths[of_sequences], self.characters[keep]
        return Encoded(tokens, lengths, sequences, _top(tokens), characters, text_tokens)


@dataclass
class SegmentResult:
    """What became of a segment. ``numbers``: line of each document, from 1 within the segment.

    ``cleaning``: what was left out, and what is needed to leave out more; None where nothing is cleaned.
    """

    encoded: dict[str, Encoded]
    numbers: npt.NDArray[np.int64]
    lines: int
    read: int
    bad: list[tuple[int, str]]
    cleaning: Cleaning | None = None


def encode_segment(segment: Segment, settings: EncodeSettings, encoder: Encoder) -> SegmentResult:
    """Read, parse and encode one segment.

    Raises:
        DataError: the file changed under us. What is wrong with single lines is in the result instead.
    """
    parsed = parse_segment(segment, settings.keys, settings.max_line)
    cleaning = settings.cleaner.clean(parsed) if settings.cleaner is not None else None
    encoded = {key: encode_documents(documents, settings, encoder) for key, documents in parsed.documents.items()}
    numbers = np.array(parsed.numbers, np.int64)
    return SegmentResult(encoded, numbers, parsed.lines, parsed.read, parsed.bad, cleaning)


def encode_documents(documents: Sequence[Document], settings: EncodeSettings, encoder: Encoder) -> Encoded:
    """Encode documents of one key; a document is a text, or a list of texts that become sequences of their own."""
    if not settings.split_sentences and all(isinstance(document, str) for document in documents):
        tokens, ends = encoder.encode_flat(documents, settings.dtype, settings.eod)  # type: ignore[arg-type]
        sizes = np.diff(ends, prepend=0).astype(np.int32)
        filled = sizes > 0
        ends_added = 0 if settings.eod is None else int(filled.sum())
        characters = np.fromiter(map(len, documents), np.int64, len(documents))
        text_tokens = len(tokens) - ends_added
        return Encoded(tokens, sizes[filled], filled.astype(np.int64), _top(tokens), characters, text_tokens)
    texts: list[str] = []
    counts: list[int] = []
    characters = np.zeros(len(documents), np.int64)
    for number, document in enumerate(documents):
        pieces = document if isinstance(document, list) else [document]
        if settings.split_sentences and isinstance(document, str):
            pieces = split_sentences(document)
        counts.append(len(pieces))
        characters[number] = sum(map(len, pieces))
        texts += pieces
    end = None if settings.eod is None else np.array([settings.eod], settings.dtype)
    arrays = encoder.encode(texts, settings.dtype)
    return _several_sequences(arrays, counts, end, settings.dtype, characters)


def _several_sequences(
    arrays: list[Ids], counts: list[int], end: Ids | None, dtype: str, characters: npt.NDArray[np.int64]
) -> Encoded:
    pieces: list[Ids] = []
    lengths: list[int] = []
    sequences: list[int] = []
    at = 0
    for count in counts:
        filled = [array for array in arrays[at : at + count] if array.shape[0]]
        at += count
        sequences.append(len(filled))
        lengths += [array.shape[0] for array in filled]
        pieces += filled
        if filled and end is not None:
            pieces.append(end)
            lengths[-1] += 1
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, dtype)
    text_tokens = sum(array.shape[0] for array in arrays)
    return Encoded(
        tokens, np.array(lengths, np.int32), np.array(sequences, np.int64), _top(tokens), characters, text_tokens
    )


def _top(tokens: Ids) -> int:
    return int(tokens.max()) if tokens.shape[0] else -1
