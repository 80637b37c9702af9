"""The tasks of ``mlm evaluate`` that ask a language model as it is: LAMBADA, ranked choices, lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlm_cli.checkpoint import agree
from mlm_cli.checkpoint.hub import load_model_folder
from mlm_cli.checkpoint.text_ends import end_ids
from mlm_cli.config.requests import HARNESS, EvaluateRequest
from mlm_cli.data.tokenizer import Tokenizer
from mlm_cli.errors import UsageError
from mlm_cli.evaluation.cloze import cloze_records, cloze_result, read_passages
from mlm_cli.evaluation.likelihood import Likelihood, Row, encode_rows, score_rows
from mlm_cli.evaluation.ranked_choice import Question, ranked_records, ranked_result, read_questions
from mlm_cli.evaluation.results import TaskResult, write_texts
from mlm_cli.jobs.scoring_parts import Progress, context_length, dtype_of, language_model_section, tokenizer_of
from mlm_cli.models.gpt import GPT
from mlm_cli.parallel.context import ParallelContext


@dataclass(frozen=True)
class _Asked:
    """A language model and how it is asked."""

    request: EvaluateRequest
    folder: Path
    parallel: ParallelContext
    tokenizer: Tokenizer
    length: int

    def model(self) -> GPT:
        model, _ = agree.all_succeed(
            lambda: load_model_folder(self.folder, self.parallel, dtype=dtype_of(self.request))
        )
        assert isinstance(model, GPT)
        return model.eval().requires_grad_(False)

    def scores(self, what: str, rows: Sequence[Row]) -> list[Likelihood]:
        with Progress(what) as progress:
            return score_rows(
                self.model(), rows, length=self.length, batch_size=self.request.batch_size, on_row=progress.update
            )

    def facts(self) -> dict[str, object]:
        """How it was asked, for ``results.json``."""
        return {
            "dataset_path": list(self.request.data),
            "output_type": "loglikelihood",
            "max_length": self.length,
        }


def evaluate_zero_shot(
    tasks: Sequence[str], request: EvaluateRequest, folder: Path, parallel: ParallelContext, *, output: Path | None
) -> list[TaskResult]:
    """Score the model in ``folder``. All ranks call.

    Args:
        tasks: ``lambada`` or ``ranked_choice`` alone, or tasks of lm-evaluation-harness, after ``check_harness``.
        output: where the scores of every question go; None: nowhere.

    Raises:
        UsageError: an ensemble, or a model that does not read from left to right.
        DataError, CheckpointError: data or a model that cannot be used.
    """
    if request.ensemble:
        raise UsageError(f"{tasks[0]} asks one model at a time", hint="evaluate the models one by one")
    section = language_model_section(folder, request.model)
    tokenizer = agree.all_succeed(lambda: tokenizer_of(request, folder, section))
    asked = _Asked(request, folder, parallel, tokenizer, context_length(request, section))
    if tasks[0].startswith(HARNESS):
        results, records = _harness([task.removeprefix(HARNESS) for task in tasks], asked)
    else:
        results, records = (_lambada if tasks[0] == "lambada" else _ranked_choice)(asked)
    if output is not None:
        agree.on_rank_zero(lambda: write_texts(records, output))
    return results


def _lambada(asked: _Asked) -> tuple[list[TaskResult], dict[str, str]]:
    request = asked.request
    found = agree.all_succeed(lambda: [passage for path in request.data for passage in read_passages(path)])
    passages = found[: request.limit]
    rows = agree.all_succeed(
        lambda: encode_rows(
            asked.tokenizer,
            [(passage.context, passage.target) for passage in passages],
            [passage.where for passage in passages],
        )
    )
    scores = asked.scores("lambada", rows)
    result = cloze_result(passages, scores, config=asked.facts(), num_original=len(found))
    return [result], {"lambada.jsonl": cloze_records(passages, scores)}


def _ranked_choice(asked: _Asked) -> tuple[list[TaskResult], dict[str, str]]:
    request = asked.request
    tasks = agree.all_succeed(lambda: _questions_by_task(request.data))
    chosen = [question for group in tasks.values() for question in group[: request.limit]]
    pairs = [(pair, question.where) for question in chosen for pair in question.pairs()]
    rows = agree.all_succeed(
        lambda: encode_rows(asked.tokenizer, [pair for pair, _ in pairs], [where for _, where in pairs])
    )
    scores = asked.scores("ranked choice", rows)
    ends = np.cumsum([len(question.pairs()) for question in chosen])
    parts = [slice(end - len(question.pairs()), end) for question, end in zip(chosen, ends.tolist(), strict=True)]
    results = [
        ranked_result(
            [question for question in chosen if question.task == name],
            [scores[part] for question, part in zip(chosen, parts, strict=True) if question.task == name],
            [rows[part] for question, part in zip(chosen, parts, strict=True) if question.task == name],
            config=asked.facts(),
            num_original=len(group),
        )
        for name, group in tasks.items()
    ]
    return results, {"ranked_choice.jsonl": ranked_records(chosen, [scores[part] for part in parts])}


def _questions_by_task(paths: Sequence[str]) -> dict[str, list[Question]]:
    """Raises UsageError: two files with one name of a task, whose scores would be one."""
    tasks: dict[str, list[Question]] = {}
    for path in paths:
        own: dict[str, list[Question]] = {}
        for question in read_questions(path):
            own.setdefault(question.task, []).append(question)
        again = next((name for name in own if name in tasks), None)
        if again is not None:
            raise UsageError(
                f"{path} and {tasks[again][0].where.rpartition(':')[0]} both hold a task `{again}`",
                hint="evaluate them one by one: their scores are not to be mixed",
            )
        tasks |= own
    return tasks


def check_harness(names: Sequence[str], folders: Sequence[str]) -> None:
    """Before any model is read. Raises UsageError: no lm-evaluation-harness, no such task, no such folder."""
    try:
        from mlm_cli.evaluation.harness import find_tasks
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{HARNESS}{names[0]} needs the package `{error.name}`", hint="pip install 'mlm-cli[harness]'"
        ) from None
    find_tasks(tuple(names), tuple(folders))


def _harness(names: Sequence[str], asked: _Asked) -> tuple[list[TaskResult], dict[str, str]]:
    from mlm_cli.evaluation.harness import Served, run_harness

    request = asked.request
    with Progress(HARNESS + ", ".join(names)) as progress:
        served = Served(
            asked.model(),
            asked.tokenizer,
            length=asked.length,
            batch_size=request.batch_size,
            end_ids=end_ids(asked.folder, asked.tokenizer),
            on_done=progress.update,
        )
        return run_harness(
            served,
            names,
            folders=request.data,
            num_fewshot=request.num_fewshot,
            limit=request.limit,
            seed=request.seed,
        )
