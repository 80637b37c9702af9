"""How well a retriever finds the text that answers a question: recall among the first k passages, and MRR.

The questions are those of SQuAD's form, the passages those of all their texts. Found is a passage of the question's own
text that holds a right answer whole (top-k accuracy of Karpukhin et al. 2020, section 4.1, which looks for the
answer's words in any text; here its place is known).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mlm_cli.errors import DataError
from mlm_cli.evaluation.results import TaskResult, json_lines, standard_error
from mlm_cli.generation.passages import Document, Passages
from mlm_cli.tasks.squad import Question, read_squad

VERSION = 1
DEPTHS = (1, 5, 10)


@dataclass(frozen=True)
class RetrievalQuestions:
    """Questions that their text answers, and the texts, each once; ``texts[text_of[i]]`` belongs to question i."""

    questions: list[Question]
    texts: list[str]
    text_of: list[int]
    num_unanswerable: int


def read_retrieval_questions(paths: Sequence[str]) -> RetrievalQuestions:
    """All questions of files in SQuAD's form; those without an answer in their text are left out, their texts stay.

    Raises:
        DataError: a file of another form, or no question with an answer.
    """
    every = [question for path in paths for question in read_squad(path, without_answer=True)]
    numbers: dict[str, int] = {}
    for question in every:
        numbers.setdefault(question.context, len(numbers))
    chosen = [question for question in every if any(start >= 0 for _, start in question.answers)]
    if not chosen:
        raise DataError(f"{', '.join(paths)}: no question has an answer in its text")
    places = [numbers[question.context] for question in chosen]
    return RetrievalQuestions(chosen, list(numbers), places, len(every) - len(chosen))


def cut_texts(asked: RetrievalQuestions, words: int, overlap: int) -> Passages:
    """Passages of the texts; the line of each is the number of its text, from 1."""
    documents = (Document(text, "text", number) for number, text in enumerate(asked.texts, 1))
    return Passages.of(documents, words, overlap)


def ranks(
    asked: RetrievalQuestions,
    passages: Passages,
    search: Callable[[str, int], list[tuple[int, float]]],
    *,
    limit: int | None = None,
    on_question: Callable[[int, int], None] = lambda _done, _total: None,
) -> np.ndarray:
    """Rank from 1 of the first passage that answers each question, float64 ``[questions]``; inf: none was found."""
    starts, total = passages.places[:, 2], len(asked.questions[:limit])
    stops = starts + np.array([len(text) for text in passages.texts()])
    found = np.full(total, np.inf)
    for number, question in enumerate(asked.questions[:limit]):
        own = passages.places[:, 1] == asked.text_of[number] + 1
        right = np.zeros(len(passages), bool)
        for answer, start in question.answers:
            if start >= 0:
                right |= own & (starts <= start) & (start + len(answer) <= stops)
        if right.any():
            order = np.array([passage for passage, _ in search(question.question, len(passages))], np.int64)
            hits = np.flatnonzero(right[order])
            found[number] = hits[0] + 1 if len(hits) else np.inf
        on_question(number + 1, total)
    return found


def retrieval_result(found: np.ndarray, *, config: dict[str, object], num_original: int) -> TaskResult:
    """``recall@k`` and ``mrr``, the mean of 1 / rank."""
    each = {f"recall@{depth}": (found <= depth).astype(float) for depth in DEPTHS} | {"mrr": 1.0 / found}
    return TaskResult(
        name="retrieval",
        metrics={name: float(values.mean()) for name, values in each.items()},
        stderr={name: standard_error(values) for name, values in each.items()},
        higher_is_better=dict.fromkeys(each, True),
        config=config,
        version=VERSION,
        num_samples=len(found),
        num_original=num_original,
    )


def retrieval_records(asked: RetrievalQuestions, found: np.ndarray) -> str:
    """A line of JSON for each question: its rank, null where none was found."""
    lines = [
        {"id": question.id, "question": question.question, "rank": int(rank) if np.isfinite(rank) else None}
        for question, rank in zip(asked.questions, found.tolist())
    ]
    return json_lines(lines)
