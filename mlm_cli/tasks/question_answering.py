"""Question answering by span selection: where in a text does the answer to a question begin and end (SQuAD).

Devlin et al. 2019, section 4.2, and the windows of its ``run_squad.py``: a text longer than the model's context is read
in windows ``task.doc_stride`` tokens apart, each behind the question; a token counts in the window that shows most of
its surroundings. Section 4.3 (SQuAD 2.0): that the text has no answer is the span of the first token alone, in every
window; it is given where its lowest score exceeds that of the best other span by ``task.null_score_diff_threshold``.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mlm_cli.config.schema import ModelSection, TaskSection
from mlm_cli.errors import UsageError
from mlm_cli.models.heads import HeadSpec
from mlm_cli.tasks.encoding import TextEncoder
from mlm_cli.tasks.features import Features
from mlm_cli.tasks.squad import Question, best_threshold, read_squad, squad_scores
from mlm_cli.tasks.task import Batch, HeadTask, Scores

# Columns of the target `windows`.
_QUESTION, _BEGIN, _LENGTH, _FIRST, _LOW, _HIGH = range(6)
_NULL = -1.0  # instead of tokens in a window's spans: there is no answer


@dataclass(frozen=True)
class Candidate:
    """A span of a text that may be the answer: characters [start, end), and its share of the probability.

    The empty span stands for "no answer in this text".
    """

    share: float
    start: int
    end: int

    @property
    def is_null(self) -> bool:
        return self.start == self.end


class QuestionAnswering(HeadTask):
    """Mean cross entropy of an answer's first and last token; exact match and F1 as SQuAD's scorer has them, 0 to 1.

    Raises:
        UsageError: ``task.null_score_diff_threshold`` is set for a model whose first token sees no other.
    """

    name: ClassVar[str] = "question_answering"
    kept: ClassVar[tuple[str, ...]] = (
        "doc_stride", "max_query_length", "max_answer_length", "null_score_diff_threshold",
    )  # fmt: skip

    def __init__(self, section: TaskSection, encoder: TextEncoder, labels: Sequence[str] = ()) -> None:
        super().__init__(section, encoder, labels)
        self.threshold = section.null_score_diff_threshold
        if self.threshold is not None and not encoder.marked:
            raise UsageError(
                "a causal model cannot say that a text has no answer: its first token sees no other",
                hint="take a BERT, or leave task.null_score_diff_threshold and such questions out",
            )

    @staticmethod
    def architecture(model: ModelSection) -> str:
        return "ForQuestionAnswering"

    @staticmethod
    def read(path: str, section: TaskSection) -> list[Question]:
        return read_squad(path, without_answer=section.null_score_diff_threshold is not None)

    def features(self, examples: Sequence[Question], *, training: bool = False) -> Features:
        """A unit a window: ``labels`` int64 [2], the answer's first and last token in the row; 0, 0 where it is not.

        Raises:
            UsageError: ``task.max_length`` leaves no room for a text behind a question.
        """
        rows, labels, windows = [], [], []
        queries = self.encoder.tokenizer.encode_batch([example.question for example in examples])
        for number, (example, query, (ids, offsets)) in enumerate(
            zip(examples, queries, self._contexts(examples), strict=True)
        ):
            query = query[: self.section.max_query_length]
            room = self.encoder.room(pair=True) - len(query)
            if room < 1:
                raise UsageError(
                    f"a question of {len(query)} tokens leaves no room for its text in {self.encoder.max_length}",
                    hint="raise task.max_length, or lower task.max_query_length",
                )
            answer = _token_span(example.answers[0], offsets) if example.answers else None
            if training and example.answers and answer is None:
                continue
            firsts = window_starts(len(ids), room, self.section.doc_stride)
            ranges = most_context(len(ids), firsts, room)
            for first, (low, high) in zip(firsts, ranges, strict=True):
                row = self.encoder.join(query, ids[first : first + room])
                windows.append((number, row.begin_second, row.len_second, first, low, high))
                rows.append(row)
                labels.append((0, 0))
                if answer is not None and first <= answer[0] and answer[1] < first + row.len_second:
                    labels[-1] = tuple(row.begin_second + place - first for place in answer)
        return Features(
            tuple(rows),
            self.encoder.pad_id,
            {
                "labels": np.array(labels, dtype=np.int64).reshape(-1, 2),
                "windows": np.array(windows, dtype=np.int64).reshape(-1, 6),
            },
        )

    def _contexts(self, examples: Sequence[Question]) -> Iterator[tuple[list[int], np.ndarray]]:
        """Ids of each example's text, and the characters [begin, end) of each, int64 [tokens, 2]."""
        last: str | None = None
        found: tuple[list[int], np.ndarray] = ([], np.zeros((0, 2), np.int64))
        for example in examples:
            if example.context != last:  # questions on one text follow each other
                last = example.context
                encoding = self.encoder.tokenizer.reference.encode(last, add_special_tokens=False)
                found = (encoding.ids, np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2))
            yield found

    @property
    def head(self) -> HeadSpec:
        return HeadSpec("token", 2, dropout=False)

    def loss(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        padding = torch.arange(outputs.shape[1], device=outputs.device) >= batch["lengths"][:, None]
        scores = outputs.masked_fill(padding[..., None], float("-inf"))
        return F.cross_entropy(scores, batch["labels"]), torch.tensor(len(outputs))

    def predict(self, outputs: Tensor, batch: Batch) -> list[np.ndarray]:
        """The best spans of each window, float64 [n, 3]: score, first and last token of the text (none: ``_NULL``)."""
        scores, windows = outputs.double().cpu().numpy(), batch["windows"].cpu().numpy()
        found = [self._best_spans(row[:, 0], row[:, 1], window) for row, window in zip(scores, windows, strict=True)]
        if self.threshold is None:
            return found
        return [np.vstack([[row[0].sum(), _NULL, _NULL], spans]) for row, spans in zip(scores, found, strict=True)]

    def _best_spans(self, start: np.ndarray, end: np.ndarray, window: np.ndarray) -> np.ndarray:
        begin, length, first = window[_BEGIN], window[_LENGTH], window[_FIRST]
        start, end = start[begin : begin + length], end[begin : begin + length]
        n = min(self.section.n_best, length)
        starts, ends = (np.argsort(-values, kind="stable")[:n] for values in (start, end))
        span = ends[None, :] - starts[:, None]
        here = (first + starts >= window[_LOW]) & (first + starts < window[_HIGH])
        allowed = (span >= 0) & (span < self.section.max_answer_length) & here[:, None]
        i, j = np.nonzero(allowed)
        found = np.stack([start[starts[i]] + end[ends[j]], first + starts[i], first + ends[j]], axis=-1)
        return found[np.argsort(-found[:, 0], kind="stable")[: self.section.n_best]]

    def answers(
        self, predictions: Sequence[np.ndarray], features: Features, examples: Sequence[Question]
    ) -> list[list[Candidate]]:
        """For each question the best spans over all its windows, best first, no text twice; "no answer" behind them."""
        by_question: list[list[np.ndarray]] = [[] for _ in examples]
        for number, found in zip(features.targets["windows"][:, _QUESTION].tolist(), predictions, strict=True):
            by_question[number].append(found)
        ranked = []
        for example, parts, (_, offsets) in zip(examples, by_question, self._contexts(examples), strict=True):
            found = np.concatenate([np.zeros((0, 3)), *parts])
            null, found = found[found[:, 1] == _NULL, 0], found[found[:, 1] != _NULL]
            chosen: dict[str, Candidate] = {}
            for score, first, last in found[np.argsort(-found[:, 0], kind="stable")].tolist():
                start, end = _without_space(example.context, int(offsets[int(first), 0]), int(offsets[int(last), 1]))
                if start < end:
                    chosen.setdefault(example.context[start:end], Candidate(score, start, end))
                if len(chosen) == self.section.n_best:
                    break
            nulls = [Candidate(float(null.min()), 0, 0)] if len(null) else []  # every window has to agree
            ranked.append(_with_shares([*chosen.values(), *nulls]))
        return ranked

    def pool(self, members: Sequence[Sequence[list[Candidate]]]) -> list[list[Candidate]]:
        """Mean shares of each span, over the models' best ones; their tokens may differ, characters are the same."""
        pooled = []
        for answers in zip(*members, strict=True):
            shares: dict[tuple[int, int], float] = defaultdict(float)
            for candidate in (candidate for found in answers for candidate in found):
                shares[candidate.start, candidate.end] += candidate.share / len(members)
            ranked = sorted(shares.items(), key=lambda item: (-item[1], item[0]))
            candidates = [Candidate(share, start, end) for (start, end), share in ranked]
            spans = [candidate for candidate in candidates if not candidate.is_null][: self.section.n_best]
            pooled.append(spans + [candidate for candidate in candidates if candidate.is_null])
        return pooled

    @staticmethod
    def check_together(sections: Mapping[str, TaskSection]) -> None:
        """All give "no answer" a share, or none does."""
        always = [name for name, section in sections.items() if section.null_score_diff_threshold is None]
        if always and len(always) < len(sections):
            raise UsageError(
                f"{', '.join(always)} always answers, the other models may find no answer",
                hint="give task.null_score_diff_threshold for all of them",
            )

    def score(self, answers: Sequence[list[Candidate]], examples: Sequence[Question], *, seed: int) -> Scores:
        spans = {
            example.id: next((example.context[c.start : c.end] for c in found if not c.is_null), "")
            for example, found in zip(examples, answers, strict=True)
        }
        odds = {example.id: _null_odds(found) for example, found in zip(examples, answers, strict=True)}
        limit = math.inf if self.threshold is None else self.threshold
        chosen = {number: "" if odds[number] > limit else text for number, text in spans.items()}
        each = squad_scores(chosen, examples)
        facts: dict[str, Any] = {"unanswered": sum(not text for text in chosen.values())}
        files = {
            "predictions.json": json.dumps(chosen, indent=1, ensure_ascii=False) + "\n",
            "nbest.json": json.dumps(_nbest(examples, answers), indent=1, ensure_ascii=False) + "\n",
        }
        has_answer = np.array([bool(example.answers) for example in examples])
        if self.threshold is not None:
            files["null_odds.json"] = json.dumps(odds, indent=1) + "\n"
            null = np.array([odds[example.id] for example in examples])
            answered = np.array([bool(spans[example.id]) for example in examples])
            for name, always in squad_scores(spans, examples).items():
                best, threshold = best_threshold(always, answered, has_answer, null)
                facts |= {f"best_{name}": best, f"best_{name}_threshold": threshold}
        if not has_answer.all():
            each["no_answer_accuracy"] = each["exact_match"][~has_answer]
            if has_answer.any():
                each |= {f"has_answer_{name}": each[name][has_answer] for name in ("f1", "exact_match")}
        errors = {name: float(np.std(v, ddof=1)) / len(v) ** 0.5 if len(v) > 1 else None for name, v in each.items()}
        return Scores({name: float(values.mean()) for name, values in each.items()}, errors, facts, files)


def window_starts(length: int, room: int, stride: int) -> list[int]:
    """First tokens of windows of ``room`` tokens over a text, ``stride`` apart (less where tokens would be missed)."""
    starts = [0]
    while starts[-1] + room < length:
        starts.append(starts[-1] + min(stride, room))
    return starts


def most_context(length: int, starts: Sequence[int], room: int) -> list[tuple[int, int]]:
    """For each window the tokens [low, high) that no other window shows with more context on both sides.

    (``_check_is_max_context`` of ``run_squad.py``: the smaller side decides, then the longer window, then the first.)
    """
    tokens = np.arange(length)
    scores = np.full((len(starts), length), -np.inf)
    for number, start in enumerate(starts):
        stop = min(start + room, length)
        inside = tokens[start:stop]
        scores[number, start:stop] = np.minimum(inside - start, stop - 1 - inside) + 0.01 * (stop - start)
    best = scores.argmax(0) if length else np.zeros(0, dtype=np.int64)
    return [
        (int(np.searchsorted(best, number)), int(np.searchsorted(best, number, side="right")))
        for number in range(len(starts))
    ]


def _token_span(answer: tuple[str, int], offsets: np.ndarray) -> tuple[int, int] | None:
    """First and last token of an answer; None where it does not stand in the text, or no token does."""
    text, begin = answer
    if begin < 0 or not text or not len(offsets):
        return None
    first = int(np.searchsorted(offsets[:, 1], begin, side="right"))
    last = int(np.searchsorted(offsets[:, 0], begin + len(text), side="left")) - 1
    return (first, last) if first <= last else None


def _without_space(context: str, start: int, end: int) -> tuple[int, int]:
    text = context[start:end]
    return start + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())


def _with_shares(candidates: list[Candidate]) -> list[Candidate]:
    """Scores as shares of the probability among these spans (as ``run_squad.py`` gives them in its n-best list)."""
    scores = np.array([candidate.share for candidate in candidates])
    shares = np.exp(scores - scores.max(initial=-np.inf)) if candidates else scores
    return [
        replace(candidate, share=float(share))
        for candidate, share in zip(candidates, shares / shares.sum() if candidates else shares, strict=True)
    ]


def _null_odds(found: Sequence[Candidate]) -> float:
    """By how much the score of "no answer" exceeds that of the best span; finite, so that it can be written as JSON."""
    shares = [max((c.share for c in found if c.is_null is null), default=0.0) for null in (True, False)]
    null, best = (math.log(max(share, 1e-300)) for share in shares)
    return null - best


def _nbest(examples: Sequence[Question], answers: Sequence[list[Candidate]]) -> dict[str, list[dict[str, Any]]]:
    return {
        example.id: [
            {"text": example.context[c.start : c.end], "probability": round(c.share, 6), "start": c.start}
            for c in found
        ]
        for example, found in zip(examples, answers, strict=True)
    }
