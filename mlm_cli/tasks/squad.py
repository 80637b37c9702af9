"""Questions on texts in SQuAD's JSON (versions 1.1 and 2.0), and the exact match and F1 of its official scorers.

Rajpurkar et al. 2016, section 6.1; ``evaluate-v1.1.py``: answers are compared without case, punctuation, articles and
surplus white space; each question counts with its best gold answer, an unanswered one with 0. Rajpurkar, Jia and Liang
2018 (``evaluate-v2.0.py``): where the text does not hold the answer, the empty answer is right and no other.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlm_cli import log
from mlm_cli.errors import DataError
from mlm_cli.tasks.labelled_text import opened_text

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


@dataclass(frozen=True)
class Question:
    """A question on a text. ``answers``: (text, first character) of each gold answer; none: it is not in the text."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]
    where: str


def read_squad(path: str | Path, *, without_answer: bool = False) -> list[Question]:
    """All questions of a file.

    Answers that do not stand where ``answer_start`` says are put where they do stand first, or are kept for scoring
    alone; how many is said once.

    Args:
        without_answer: take questions that the text does not answer (SQuAD 2.0).

    Raises:
        DataError: a file that does not open or has another form; a question without answer; none at all.
    """
    path = Path(path)
    with opened_text(path) as file:
        try:
            document = json.load(file)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno} is not JSON: {error.msg} at column {error.colno}") from None
    questions: list[Question] = []
    moved: list[str] = []
    articles = _member(document, "data", list, str(path))
    for i, article in enumerate(articles):
        for j, paragraph in enumerate(_member(article, "paragraphs", list, f"{path}: data[{i}]")):
            where = f"{path}: data[{i}].paragraphs[{j}]"
            context = _member(paragraph, "context", str, where)
            for k, entry in enumerate(_member(paragraph, "qas", list, where)):
                questions.append(_question(entry, context, f"{where}.qas[{k}]", moved))
                if not (questions[-1].answers or without_answer):
                    raise DataError(
                        f"{questions[-1].where} has no answer",
                        hint="for questions without answer (SQuAD 2.0) set task.null_score_diff_threshold=0",
                    )
    if not questions:
        raise DataError(f"{path} holds no questions")
    if moved:
        log.warn(f"{len(moved):,} answers do not stand where `answer_start` says, the first at {moved[0]}")
    return questions


def _question(entry: Any, context: str, where: str, moved: list[str]) -> Question:
    number, question = str(_member(entry, "id", (str, int), where)), _member(entry, "question", str, where)
    where = f"{where} (id {number})"
    answers = []
    for answer in _member(entry, "answers", list, where):
        text, start = _member(answer, "text", str, where), _member(answer, "answer_start", int, where)
        if context[start : start + len(text)] != text:
            moved.append(where)
            start = context.find(text)
        answers.append((text, start))
    return Question(number, question, context, tuple(answers), where)


def _member(value: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, kind):
        raise DataError(
            f"{where}: `{key}` is missing or no {'list' if kind is list else 'text or number'}",
            hint="the form is that of SQuAD: data[].paragraphs[].context and .qas[].id, .question, .answers[]",
        )
    return found


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, English articles and surplus white space."""
    kept = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def answer_f1(predicted: str, gold: str) -> float:
    """F1 over the words that two answers share."""
    ours, theirs = normalize_answer(predicted).split(), normalize_answer(gold).split()
    shared = sum((Counter(ours) & Counter(theirs)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(ours), shared / len(theirs)
    return 2 * precision * recall / (precision + recall)


def squad_scores(predictions: Mapping[str, str], questions: Sequence[Question]) -> dict[str, np.ndarray]:
    """``f1`` and ``exact_match`` of each question, float64 [questions], between 0 and 1.

    By the rules of version 2.0 if any question is without answer. A question without prediction scores 0.
    """
    second = any(not question.answers for question in questions)
    f1, exact = np.zeros(len(questions)), np.zeros(len(questions))
    for place, question in enumerate(questions):
        predicted = predictions.get(question.id)
        if predicted is None:
            continue
        golds = [text for text, _ in question.answers]
        if second:
            golds = [text for text in golds if normalize_answer(text)] or [""]
        same = [normalize_answer(predicted) == normalize_answer(gold) for gold in golds]
        exact[place] = max(same)
        f1[place] = max(
            1.0 if second and equal else answer_f1(predicted, gold) for gold, equal in zip(golds, same, strict=True)
        )
    return {"f1": f1, "exact_match": exact}


def best_threshold(
    scores: np.ndarray, answered: np.ndarray, has_answer: np.ndarray, null: np.ndarray
) -> tuple[float, float]:
    """The mean score that the best threshold on ``null`` gives, and that threshold.

    A question is left without answer where ``null`` is above the threshold (``find_best_thresh`` of the official
    scorer; questions with equal ``null`` go together here).

    Args:
        scores: float64 [questions], of always answering.
        answered: bool [questions], whether that answer is not empty.
        has_answer: bool [questions], whether the text has one.
        null: float64 [questions], by how much the empty answer is the likelier one.
    """
    order = np.argsort(null, kind="stable")
    gains = np.where(has_answer, scores, np.where(answered, -1.0, 0.0))[order]
    # With the first n in this order answered, for every n where the next differs; none at all to begin with.
    sums = np.concatenate([[0.0], np.cumsum(gains)]) + np.count_nonzero(~has_answer)
    limits = np.concatenate([[null.min() - 1.0], null[order]])
    sums[:-1][limits[1:] == limits[:-1]] = -np.inf
    best = int(sums.argmax())
    return float(sums[best]) / len(scores), float(limits[best])
