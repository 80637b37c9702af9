"""The kinds of task by name: what each measures and which recipe keys it reads; known without loading any of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

from mlm_cli.config.mistakes import Mistake
from mlm_cli.config.schema import TaskSection

_ALL = frozenset({"name", "train", "dev", "max_length", "epochs", "metric"})
_TABLE = frozenset({"text_column", "label_column", "header"})
_WRITTEN = _TABLE | {"prefix", "suffix", "max_target_length", "beams", "length_penalty"}


@dataclass(frozen=True)
class TaskKind:
    """One kind of task.

    Attributes:
        metrics: what ``task.metric`` may be; the first is the default. More is better.
        keys: keys of the ``task`` section that it reads, beside those that all do.
        what: the data it wants, for users.
    """

    metrics: tuple[str, ...]
    keys: frozenset[str]
    what: str


TASK_KINDS = {
    "classification": TaskKind(("accuracy", "f1"), _TABLE | {"text_pair_column", "labels"}, "a labelled file"),
    "regression": TaskKind(("pearson", "spearman"), _TABLE | {"text_pair_column"}, "a file of texts and scores"),
    "token_classification": TaskKind(
        ("f1", "precision", "recall", "accuracy"), frozenset({"text_column", "label_column", "labels"}), "a CoNLL file"
    ),
    "question_answering": TaskKind(
        ("f1", "exact_match"),
        frozenset({"doc_stride", "max_query_length", "max_answer_length", "n_best", "null_score_diff_threshold"}),
        "a JSON file in the form of SQuAD",
    ),
    "multiple_choice": TaskKind(
        ("accuracy",), _TABLE | {"text_pair_column", "choice_columns"}, "a file of questions and choices"
    ),
    "embedding": TaskKind(
        ("spearman", "pearson"),
        _TABLE | {"text_pair_column", "pooling", "loss", "temperature", "max_score", "min_positive"},
        "a file of pairs and scores",
    ),
    "translation": TaskKind(("bleu", "chrf"), _WRITTEN | {"bleu_tokenize"}, "a file of texts and their translations"),
    "summarization": TaskKind(
        ("rouge2", "rouge1", "rougeL", "rougeLsum"), _WRITTEN | {"rouge_tokenize"}, "a file of texts and summaries"
    ),
    "text_generation": TaskKind(("f1", "exact_match"), _WRITTEN, "a file of texts and what is to be answered"),
}
# Kinds whose answers are texts that the model writes, with the output layer that it was pretrained with.
WRITTEN_KINDS = ("translation", "summarization", "text_generation")


def check_task(task: TaskSection) -> Iterator[Mistake]:
    """Keys that the kind does not read or that it needs, and a metric that it does not have."""
    kind = TASK_KINDS[task.name]
    defaults = TaskSection.model_fields
    for key in defaults:
        if key not in _ALL | kind.keys and getattr(task, key) != defaults[key].default:
            readers = [name for name, other in TASK_KINDS.items() if key in other.keys]
            yield Mistake(
                (f"task.{key}", "task.name"),
                f"`task.{key}` means nothing to `task.name` {task.name}",
                f"it is for {', '.join(readers)}; leave it out, or change `task.name`",
            )
    if task.metric is not None and task.metric not in kind.metrics:
        near = difflib.get_close_matches(task.metric, kind.metrics, n=1)
        yield Mistake(
            ("task.metric", "task.name"),
            f"`task.metric` {task.metric} is not measured by {task.name}",
            f"did you mean `{near[0]}`?" if near else f"use {' or '.join(f'`{name}`' for name in kind.metrics)}",
        )
    if task.length_penalty != defaults["length_penalty"].default and task.beams == 1:
        yield Mistake(
            ("task.length_penalty", "task.beams"),
            f"`task.length_penalty` {task.length_penalty:g} is for a beam search, and `task.beams` is 1",
            "use `task.beams=4`, or leave `task.length_penalty` out",
        )
    if task.name == "embedding" and task.text_pair_column is None:
        yield Mistake(
            ("task.text_pair_column", "task.name"),
            "`task.text_pair_column` is not set: an embedding is learned from pairs of texts",
            "name the column of the second text",
        )
    if task.name == "token_classification":
        for key in ("text_column", "label_column"):
            value = getattr(task, key)
            if isinstance(value, str) and value != defaults[key].default:
                yield Mistake(
                    (f"task.{key}", "task.name"),
                    f"`task.{key}` is `{value}`, and the columns of CoNLL files have numbers",
                    "count from 0, from the last with -1; unset: the first and the last column",
                )


def metric_of(task: TaskSection) -> str:
    """What decides which checkpoint is best."""
    return task.metric or TASK_KINDS[task.name].metrics[0]
