"""Beam search: the answer whose tokens are likeliest together, as far as a few hypotheses side by side can tell.

The rules of when a hypothesis is finished and when the search ends are those of transformers (``GenerationMixin``,
``early_stopping=False``), so that scores published with it can be compared.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mlm_cli.errors import UsageError
from mlm_cli.generation.search import Search, Searched


@dataclass(eq=False, kw_only=True)
class _Beams(Searched):
    """A text and its hypotheses.

    Attributes:
        scores: sums of log-probabilities of those that go on, best first.
        answers: their tokens.
        finished: (score by length, tokens) of the best that ended.
    """

    scores: list[float] = field(default_factory=lambda: [0.0])
    answers: list[list[int]] = field(default_factory=lambda: [[]])
    finished: list[tuple[float, list[int]]] = field(default_factory=list)


class BeamSearch(Search[_Beams]):
    """Answers prompts by beam search; see ``Search``. Pieces of text are shown when the whole answer is certain.

    Of hypotheses that ended the best has the largest score divided by its length to the power of
    ``settings.length_penalty``: above 0 longer answers gain, below 0 shorter ones.
    """

    text_type = _Beams

    @property
    def _num_candidates(self) -> int:
        """So many that, were each end of a text among the best of every hypothesis, there would be enough to go on."""
        return max(2, 1 + len(self._settings.end_ids)) * self._width

    def _check_vocabulary(self, size: int) -> None:
        if self._num_candidates > size:
            raise UsageError(
                f"a search with {self._width} beams chooses among {self._num_candidates} tokens at a time, and the "
                f"vocabulary has {size}",
                hint="use fewer beams",
            )

    def _begin(self, text: _Beams, logits: Tensor) -> None:
        self._go_on([text], logits[None, None])

    def _take(self, logits: Tensor) -> None:
        self._go_on(self._texts, logits)

    def _go_on(self, texts: list[_Beams], logits: Tensor) -> None:
        """``logits [t, hypotheses, v]``."""
        scores = torch.log_softmax(logits, -1)
        for text, rows in zip(texts, scores, strict=True):
            for row, answer in zip(rows, text.answers, strict=True):
                self._adjust(row, text, answer)
        scores += torch.tensor([text.scores for text in texts], device=scores.device)[..., None]
        best, places = scores.flatten(1).topk(self._num_candidates)
        vocabulary = scores.shape[-1]
        for text, values, flat in zip(texts, best.tolist(), places.tolist(), strict=True):
            self._choose(text, [(value, *divmod(place, vocabulary)) for value, place in zip(values, flat, strict=True)])

    def _choose(self, text: _Beams, candidates: list[tuple[float, int, int]]) -> None:
        """Take over the best of ``candidates`` (score, hypothesis, token), which are in order."""
        length = len(text.answers[0]) + 1  # that of the candidates
        full = length >= text.limit
        ends = text.settings.end_ids
        for score, parent, token in candidates[: self._width]:
            if full or token in ends:
                ended = (score / length**text.settings.length_penalty, [*text.answers[parent], token])
                text.finished = heapq.nlargest(self._width, [*text.finished, ended], key=lambda pair: pair[0])
        going = [] if full else [candidate for candidate in candidates if candidate[2] not in ends][: self._width]
        if not going or self._is_over(text, going[0][0], length):
            self._finish(text)
            return
        text.scores = [score for score, _, _ in going]
        text.parents = [parent for _, parent, _ in going]
        text.next_tokens = [token for _, _, token in going]
        text.answers = [[*text.answers[parent], token] for _, parent, token in going]

    def _is_over(self, text: _Beams, best: float, length: int) -> bool:
        """Is the best that goes on no better, at its length now, than the worst of enough that ended?"""
        return len(text.finished) == self._width and best / length**text.settings.length_penalty <= text.finished[-1][0]

    def _finish(self, text: _Beams) -> None:
        for token in text.finished[0][1]:
            text.take(token)
            if text.finish is not None:  # a stop string, if not the end
                break
