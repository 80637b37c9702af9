"""The kinds of task by name. A new kind is a file here, a line in this table and one in ``config.tasks``."""

from __future__ import annotations

from mlm_cli.tasks.classification import Classification
from mlm_cli.tasks.embedding import Embedding
from mlm_cli.tasks.multiple_choice import MultipleChoice
from mlm_cli.tasks.question_answering import QuestionAnswering
from mlm_cli.tasks.regression import Regression
from mlm_cli.tasks.task import Task
from mlm_cli.tasks.token_classification import TokenClassification

_KINDS: tuple[type[Task], ...] = (
    Classification,
    Regression,
    TokenClassification,
    QuestionAnswering,
    MultipleChoice,
    Embedding,
)
TASKS: dict[str, type[Task]] = {kind.name: kind for kind in _KINDS}
