"""Sample number -> a run of sentences of one document, without an index of samples or of documents.

BERT's samples are runs of whole sentences of one document, up to a length. How many of them a corpus gives is a sum
over its documents, and which document the k-th lies in needs the partial sums of it: Megatron-LM walks all sentences
and keeps such an index. Here the sums are those that the ``.idx`` holds anyway. Give each document of n tokens the room
of n + T on a line, where T is the length of a run: it then begins at (tokens before it) + T * (documents before it), so
that a binary search finds the document of any place. Put a slot on every T-th place, shifted from epoch to epoch. A
document has at least floor((n + T) / T) >= ceil(n / T) slots, as many as it has runs, whatever the shift. So

- slot j of a document is its run j: **in an epoch every sentence lies in at least one run**, and no run twice by this;
- a slot that is left over (at most one more than there are runs, and those of empty documents) shows a run drawn anew
  from all slots, each run being as likely as any other.

An epoch is therefore the whole corpus once, and some runs (half a run a document on average) a second time, spread
evenly over it: no document is favoured for being short or long.

A document is cut every T tokens, from a place drawn for each epoch, and each cut moves on to the next sentence; only a
sentence longer than what lies between two cuts is itself cut. Opening costs the same at any size, and a sample a few
binary searches.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

import numpy as np

from mlm_cli.data.order import derive_key, epoch_shift, sample_position
from mlm_cli.data.token_stream import TokenStream, first_token_of_document
from mlm_cli.errors import DataError

_TRIES = 10_000
_CUTS, _SHIFT_KEY = 3, 4  # what a derived key is for


@dataclass(frozen=True)
class Run:
    """Tokens [begin, end) of the ``.bin``, all of ``document``; ``sentences``: where others begin between these."""

    document: int
    begin: int
    end: int
    sentences: np.ndarray


class SentenceRuns:
    """The runs of a stream of documents whose sequences are sentences.

    Args:
        tokens: the documents.
        length: tokens of a run, at least 2 * ``shortest``. A run may be longer by what its last sentence reaches beyond
            that, or shorter.
        shortest: documents with fewer tokens are never shown; at least 1.
        seed, stream: decide order and cuts.
        eod_id: taken off the end of documents.
    """

    def __init__(
        self, tokens: TokenStream, *, length: int, shortest: int, seed: int, stream: int, eod_id: int | None
    ) -> None:
        self.tokens, self.length, self.shortest = tokens, length, shortest
        self.seed, self.stream, self.eod_id = seed, stream, eod_id
        self.num_slots = -(-self._place(tokens.documents.stop) // length)

    def _place(self, document: int) -> int:
        """Where a document begins on the line."""
        stream = self.tokens
        before = first_token_of_document(stream.dataset, document) - stream.start
        return before + self.length * (document - stream.documents.start)

    def find(self, number: int) -> Run:
        """The ``number``-th run over all epochs.

        Raises:
            DataError: next to all documents are empty.
        """
        epoch, slot = sample_position(number, self.num_slots, self.seed, self.stream)
        shift = epoch_shift(self.length, self.seed, epoch, self.stream)
        for attempt in range(_TRIES):
            if (run := self._run_of_slot(slot, shift, epoch)) is not None:
                return run
            slot = derive_key(self.seed, self.stream, number, _SHIFT_KEY, attempt) % self.num_slots
        raise DataError(
            f"{self.tokens.name}: next to all of its documents are empty", hint="preprocess it without them"
        )

    def _run_of_slot(self, slot: int, shift: int, epoch: int) -> Run | None:
        place = slot * self.length + shift
        documents = self.tokens.documents
        document = bisect_right(documents, place, key=self._place) - 1 + documents.start
        first_slot = -(-(self._place(document) - shift) // self.length)
        begin, end = self.span(document)
        part = slot - max(0, first_slot)
        if end - begin < self.shortest or part >= -(-(end - begin) // self.length):
            return None
        return self._part(document, begin, end, part, derive_key(self.seed, self.stream, epoch, document, _CUTS))

    def span(self, document: int) -> tuple[int, int]:
        """[begin, end) of a document's tokens in the ``.bin``, without its end-of-document id."""
        dataset = self.tokens.dataset
        begin, end = first_token_of_document(dataset, document), first_token_of_document(dataset, document + 1)
        if end > begin and self.eod_id is not None and int(dataset.tokens(end - 1, end)[0]) == self.eod_id:
            end -= 1
        return begin, end

    def _part(self, document: int, begin: int, end: int, part: int, key: int) -> Run:
        """Run ``part`` of a document: cuts every ``length`` tokens, the first run of a length of its own."""
        size = end - begin
        num_parts = -(-size // self.length)
        if num_parts == 1:
            return Run(document, begin, end, self.sentences(document, begin, end))
        # what the first and the last run share, of which each gets at least a quarter
        rest = size - (num_parts - 2) * self.length
        low = max(rest - self.length, rest // 4, self.shortest)
        high = min(self.length, rest - rest // 4, rest - self.shortest)
        first = begin + low + key % (high - low + 1)
        cuts = [min(end, first + number * self.length) for number in range(part - 1, part + 2)]
        start = self._to_sentence(document, cuts[0], cuts[1]) if part else begin
        stop = end if part == num_parts - 1 else self._to_sentence(document, cuts[1], cuts[2])
        return Run(document, start, stop, self.sentences(document, start, stop))

    def _to_sentence(self, document: int, cut: int, following: int) -> int:
        """Where the next sentence from ``cut`` on begins, if it leaves ``shortest`` to the next cut; else ``cut``."""
        dataset = self.tokens.dataset
        index, size = dataset.document_index, dataset.dtype.itemsize
        low, high = int(index[document]), int(index[document + 1])
        number = bisect_left(dataset.offsets, cut * size, low, high)
        if number == high:
            return cut
        found = int(dataset.offsets[number]) // size
        return found if found <= following - self.shortest else cut

    def sentences(self, document: int, begin: int, end: int) -> np.ndarray:
        """Places between ``begin`` and ``end`` in the ``.bin`` at which a sentence of the document begins; int64."""
        dataset = self.tokens.dataset
        index, size = dataset.document_index, dataset.dtype.itemsize
        low, high = int(index[document]), int(index[document + 1])
        first = bisect_right(dataset.offsets, begin * size, low, high)
        last = bisect_left(dataset.offsets, end * size, first, high)
        return np.asarray(dataset.offsets[first:last], dtype=np.int64) // size
