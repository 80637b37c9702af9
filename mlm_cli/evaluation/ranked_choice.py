"""Questions whose answer is the likeliest of some given continuations (rank classification; Brown et al. 2020, 2.4).

Two kinds of JSON lines are read: questions, ``{"context", "choices", "label"}``, and the requests that OLMES and
OLMo's evaluations are published as (Gu et al. 2024), one line a choice, perhaps with requests that ask for the same
choice without its question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlm_cli.errors import DataError
from mlm_cli.evaluation.likelihood import Likelihood, Row
from mlm_cli.evaluation.results import TaskResult, json_lines, standard_error
from mlm_cli.tasks.labelled_text import opened_text

VERSION = 1
_UNCONDITIONAL = 1_000_000  # added to the number of a document whose choices stand without their question
_ENDINGS = re.compile(r"(\.jsonl|\.json)?(\.gz|\.zst)?$")


@dataclass
class Question:
    """A question and its choices.

    Attributes:
        context: what stands before each choice, examples included.
        choices: continuations, with the space that parts them from the context.
        label: the right one.
        bare: what stands before a choice where it is asked for without the question; None: it is not.
    """

    task: str
    context: str
    choices: list[str]
    label: int
    where: str
    bare: str | None = None

    def pairs(self) -> list[tuple[str, str]]:
        """(context, continuation) to be scored: of each choice, then of each without the question."""
        asked = [(self.context, choice) for choice in self.choices]
        return asked + ([] if self.bare is None else [(self.bare, choice) for choice in self.choices])


def read_questions(path: str) -> list[Question]:
    """Questions of a ``.jsonl`` file (also ``.gz``, ``.zst``).

    Raises:
        DataError: no such file, not UTF-8, a malformed line, a question without its choices, a label that is none.
    """
    name = _ENDINGS.sub("", Path(path).name)
    published = _Published(path)
    found = []
    with opened_text(Path(path)) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            row = _object(line, where)
            if "request" in row:
                published.add(row, where)
            else:
                found.append(_own(row, name, where))
    found += published.questions()
    if not found:
        raise DataError(f"{path} holds no questions")
    for question in found:
        if not 0 <= question.label < len(question.choices) or len(question.choices) < 2:
            raise DataError(
                f"{question.where}: label {question.label} is none of the {len(question.choices)} choices"
                if len(question.choices) > 1
                else f"{question.where}: a question has two choices or more"
            )
    return found


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where} is not a JSON object")
    return row


def _own(row: dict[str, Any], name: str, where: str) -> Question:
    context, choices, label = row.get("context"), row.get("choices"), row.get("label")
    if not isinstance(context, str) or not _texts(choices) or not _whole(label):
        raise DataError(
            f"{where}: not a question",
            hint='a line has "context": a text, "choices": texts, "label": the number of the right one, from 0',
        )
    assert isinstance(choices, list) and isinstance(label, int)
    # Contexts and choices are parted by one space, which is the choice's: tokenizers have it at the word.
    return Question(name, context.rstrip(), [f" {choice.strip()}" for choice in choices], label, where)


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) and text.strip() for text in value)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass
class _Published:
    """Requests of one file, put together by document."""

    path: str
    asked: dict[tuple[str, int], dict[int, tuple[str, str]]] = field(default_factory=dict)
    facts: dict[tuple[str, int], tuple[int, str]] = field(default_factory=dict)

    def add(self, row: dict[str, Any], where: str) -> None:
        request, task = row["request"], row.get("task_name", _ENDINGS.sub("", Path(self.path).name))
        numbers = [row.get(name) for name in ("doc_id", "idx", "label")]
        texts = [request.get(name) for name in ("context", "continuation")] if isinstance(request, dict) else [None]
        if not all(map(_whole, numbers)) or not all(isinstance(text, str) for text in (*texts, task)):
            raise DataError(
                f"{where}: not a request",
                hint='a line has "request": {"context", "continuation"}, "doc_id", "idx" and "label"',
            )
        document, place, label = numbers
        choices = self.asked.setdefault((task, document), {})
        if place in choices:
            raise DataError(f"{where}: choice {place} of document {document} is there twice")
        choices[place] = (texts[0], texts[1])
        self.facts.setdefault((task, document), (label, where))

    def questions(self) -> Iterator[Question]:
        for (task, document), choices in self.asked.items():
            if document >= _UNCONDITIONAL and (task, document - _UNCONDITIONAL) in self.asked:
                continue
            label, where = self.facts[task, document]
            if sorted(choices) != list(range(len(choices))):
                raise DataError(f"{where}: document {document} lacks choices: it has {sorted(choices)}")
            contexts = {context for context, _ in choices.values()}
            if len(contexts) > 1:
                raise DataError(f"{where}: the choices of document {document} stand behind different contexts")
            texts = [choices[place][1] for place in range(len(choices))]
            question = Question(task, contexts.pop(), texts, label, where)
            bare = self.asked.get((task, document + _UNCONDITIONAL))
            if bare is not None and [bare.get(place, ("", ""))[1] for place in range(len(texts))] == texts:
                question.bare = bare[0][0]
            yield question


def ranked_result(
    questions: Sequence[Question],
    scores: Sequence[Sequence[Likelihood]],
    rows: Sequence[Sequence[Row]],
    *,
    config: dict[str, object],
    num_original: int,
) -> TaskResult:
    """Accuracies of one task: the choice of the highest ...

    - ``acc``: log-likelihood;
    - ``acc_norm``: log-likelihood a character of the choice, without the space before it (the harness's name; OLMES:
      ``acc_per_char``);
    - ``acc_per_token``: log-likelihood a token;
    - ``acc_uncond``: what the question adds to the log-likelihood of the choice by itself, where all ask for that
      (OLMES' name; the harness has ``acc_mutual_info``).

    Args:
        scores, rows: of each question's ``pairs``.
    """
    rules: dict[str, list[float]] = {"acc": [], "acc_norm": [], "acc_per_token": []}
    if all(question.bare is not None for question in questions):
        rules["acc_uncond"] = []
    for question, found, asked in zip(questions, scores, rows, strict=True):
        number = len(question.choices)
        totals = np.array([one.total for one in found[:number]])
        values = {
            "acc": totals,
            "acc_norm": totals / [len(choice.removeprefix(" ")) for choice in question.choices],
            "acc_per_token": totals / [row.num_scored for row in asked[:number]],
        }
        if "acc_uncond" in rules:
            values["acc_uncond"] = totals - [one.total for one in found[number:]]
        for name, value in values.items():
            rules[name].append(float(value.argmax() == question.label))
    return TaskResult(
        name=questions[0].task,
        metrics={name: float(np.mean(hits)) for name, hits in rules.items()},
        stderr={name: standard_error(np.array(hits)) for name, hits in rules.items()},
        higher_is_better=dict.fromkeys(rules, True),
        config=config,
        version=VERSION,
        num_samples=len(questions),
        num_original=num_original,
    )


def ranked_records(questions: Sequence[Question], scores: Sequence[Sequence[Likelihood]]) -> str:
    """Every question's scores, as JSON lines."""
    records = []
    for question, found in zip(questions, scores, strict=True):
        totals = [one.total for one in found]
        record: dict[str, Any] = {
            "task": question.task, "where": question.where, "choices": question.choices, "label": question.label,
            "log_likelihoods": totals[: len(question.choices)],
        }  # fmt: skip
        if question.bare is not None:
            record["without_question"] = totals[len(question.choices) :]
        records.append(record)
    return json_lines(records)
