"""The kinds of task by name. A new kind is a file here, a line in this table and one in ``config.tasks``."""

from __future__ import annotations

from pathlib import Path

from mlm_cli.checkpoint.hub import read_model_config, task_class, trained_task
from mlm_cli.config.schema import TaskSection
from mlm_cli.data.tokenizer import Tokenizer
from mlm_cli.errors import CheckpointError
from mlm_cli.tasks.classification import Classification
from mlm_cli.tasks.embedding import Embedding
from mlm_cli.tasks.encoding import TextEncoder
from mlm_cli.tasks.multiple_choice import MultipleChoice
from mlm_cli.tasks.question_answering import QuestionAnswering
from mlm_cli.tasks.regression import Regression
from mlm_cli.tasks.task import Task
from mlm_cli.tasks.task_folder import read_facts
from mlm_cli.tasks.token_classification import TokenClassification
from mlm_cli.tasks.writing import Summarization, TextGeneration, Translation

_KINDS: tuple[type[Task], ...] = (
    Classification,
    Regression,
    TokenClassification,
    QuestionAnswering,
    MultipleChoice,
    Embedding,
    Translation,
    Summarization,
    TextGeneration,
)
TASKS: dict[str, type[Task]] = {kind.name: kind for kind in _KINDS}

_BY_CLASS = {
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
    "ForMultipleChoice": "multiple_choice",
}


def task_of(folder: Path, tokenizer: Tokenizer) -> Task:
    """The task that the model in ``folder`` was fine-tuned to, from its ``config.json``.

    Raises:
        CheckpointError: it was not fine-tuned to one that is known.
    """
    _, config = read_model_config(folder)
    kind = "regression" if config.get("problem_type", str, "") == "regression" else "classification"
    kind = _BY_CLASS.get(task_class(config) or "", kind)
    name = trained_task(config) or kind
    if name not in TASKS:
        raise CheckpointError(f"{folder} was fine-tuned to `{name}`", hint=f"known tasks: {', '.join(TASKS)}")
    facts = read_facts(folder, TASKS[name])
    section = TaskSection(name=name, train="", dev="", **facts.settings)  # type: ignore[arg-type]
    return TASKS[name](section, TextEncoder(tokenizer, facts.section, facts.max_length), facts.labels)
