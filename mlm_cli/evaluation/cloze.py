"""The last word of a passage, as LAMBADA asks for it (Paperno et al. 2016): can the model say it, and how likely is it?

The protocol is that of lm-evaluation-harness (``lambada_openai``): the context is all before the last space, the target
that space and the word; right is the word whose tokens are each the likeliest. Megatron-LM's paper reports the same
accuracy (Shoeybi et al. 2019, section 5.3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlm_cli.data.compressed import PACKED
from mlm_cli.errors import DataError
from mlm_cli.evaluation.documents import located_texts
from mlm_cli.evaluation.likelihood import Likelihood
from mlm_cli.evaluation.results import TaskResult, json_lines, standard_error
from mlm_cli.tasks.labelled_text import opened_text

VERSION = 1


@dataclass(frozen=True)
class Passage:
    """``context`` and the ``target`` that ends it, its space included; ``where``: file and line."""

    context: str
    target: str
    where: str


def read_passages(path: str) -> list[Passage]:
    """Passages of a file: one a line, or under ``text`` in JSON lines (``.jsonl``, ``.json``); also ``.gz``, ``.zst``.

    Raises:
        DataError: no such file, not UTF-8, a malformed line, a passage of one word, no passages.
    """
    found = [_passage(text, where) for where, text in _located(path)]
    if not found:
        raise DataError(f"{path} holds no passages")
    return found


def _located(path: str) -> Iterator[tuple[str, str]]:
    """Where each passage stands, and its text."""
    name = Path(path)
    suffix = Path(name.stem).suffix if name.suffix in PACKED else name.suffix
    if suffix in (".jsonl", ".json"):
        yield from located_texts(name)
        return
    with opened_text(name) as lines:
        yield from ((f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip())


def _passage(text: str, where: str) -> Passage:
    context, space, word = text.strip().rpartition(" ")
    if not context.strip():
        raise DataError(f"{where}: a passage has two words or more: the last is to be guessed from the others")
    return Passage(context, space + word, where)


def cloze_result(
    passages: Sequence[Passage], found: Sequence[Likelihood], *, config: dict[str, object], num_original: int
) -> TaskResult:
    """``acc``, and ``perplexity`` of the last words: exp of the mean loss a word, as the harness has it."""
    hits = np.array([one.greedy for one in found], dtype=float)
    losses = -np.array([one.total for one in found])
    perplexity, error = math.exp(min(losses.mean(), 709.0)), standard_error(losses)
    return TaskResult(
        name="lambada",
        metrics={"perplexity": perplexity, "acc": float(hits.mean())},
        stderr={"perplexity": error and error * perplexity, "acc": standard_error(hits)},  # the first: delta method
        higher_is_better={"perplexity": False, "acc": True},
        config=config,
        version=VERSION,
        num_samples=len(passages),
        num_original=num_original,
    )


def cloze_records(passages: Sequence[Passage], found: Sequence[Likelihood]) -> str:
    """Every passage's target with its score, as JSON lines."""
    records = (
        {"where": passage.where, "target": passage.target, "log_likelihood": one.total, "greedy": one.greedy}
        for passage, one in zip(passages, found, strict=True)
    )
    return json_lines(records)
