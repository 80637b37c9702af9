"""What `mlm evaluate` and `mlm generate` were asked to do: plain values from the command line to the job.

A request is to these verbs what the recipe is to training. The command line fills it from the model, a recipe (if any)
and the flags; the job reads it and nothing else. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mlm_cli.config.retrieval_section import RetrievalSection
from mlm_cli.config.tasks import TASK_KINDS
from mlm_cli.errors import UsageError

OutputFormat = Literal["text", "json"]
RETRIEVAL = "retrieval"  # the task of `mlm evaluate` that needs no model
# What these tasks of `mlm evaluate` need, which no fine-tuning run names.
NEEDED_DATA = {
    "perplexity": ("text", "give files or an indexed prefix with --data"),
    "crows_pairs": ("its pairs of sentences", "give crows_pairs_anonymized.csv with --data"),
    "stereoset": ("its sentences", "give StereoSet's dev.json with --data"),
    "lambada": ("its passages", "give lambada_test.jsonl, or a passage a line, with --data"),
    RETRIEVAL: ("questions on texts", "give a JSON file in the form of SQuAD with --data"),
    "ranked_choice": ("questions and their choices", "give JSON lines with --data"),
    "watermark": ("texts", "give JSON lines, as `mlm generate --format json` writes them, or text files with --data"),
}
WEIGHTLESS_TASKS = ("watermark",)  # read a model's tokenizer and the size of its vocabulary alone
EVALUATION_TASKS = (*NEEDED_DATA, *TASK_KINDS)  # known without loading any of them
TAKES_MAX_LENGTH = ("perplexity", "lambada", "ranked_choice")  # `evaluate.max_length`; tasks of the harness do, too
HARNESS = "lm_eval:"  # before the name of a task of lm-evaluation-harness
Precision = Literal["auto", "fp32", "bf16"]
WatermarkScheme = Literal["lefthash", "selfhash"]


def check_tasks(tasks: Sequence[str], data: Sequence[str]) -> None:
    """Raises UsageError: a task of ``mlm evaluate`` that is not known, or that needs ``data`` of its own."""
    harness, files = (
        [task for task in tasks if task.startswith(HARNESS) == is_harness] for is_harness in (True, False)
    )
    if harness and files and data:
        raise UsageError(
            f"--data cannot be for both {harness[0]} (folders of tasks) and {files[0]} (its files)",
            hint="evaluate them in two commands",
        )
    for task in tasks:
        if task.startswith(HARNESS) and task != HARNESS:
            continue
        if task not in EVALUATION_TASKS:
            near = difflib.get_close_matches(task, EVALUATION_TASKS, n=1)
            known = f"known tasks: {', '.join(EVALUATION_TASKS)}, {HARNESS}NAME"
            raise UsageError(f"unknown task `{task}`", hint=f"did you mean `{near[0]}`?" if near else known)
        if task in NEEDED_DATA and not data:
            needed, hint = NEEDED_DATA[task]
            raise UsageError(f"{task} needs {needed}", hint=hint)


@dataclass(frozen=True)
class ReplayRequest:
    """Take a step of a run again, and compare.

    Attributes:
        run: the run folder; nothing in it is changed.
        step: which step; None: the one that made the newest checkpoint, whose state is then compared too.
    """

    run: str
    step: int | None = None


@dataclass(frozen=True)
class EvaluateRequest:
    """Score ``model`` on ``tasks``.

    Attributes:
        model: run folder, checkpoint folder, Hugging Face folder, one of Megatron-LM, or Hub name.
        ensemble: further models whose answers are averaged with those of ``model``.
        tasks: of ``EVALUATION_TASKS``, or ``lm_eval:NAME``.
        data: text files or prefixes of indexed data sets (perplexity), the task's files, or folders of further tasks
            of lm-evaluation-harness.
        stride: tokens scored per window; unset: the whole window, so that windows do not overlap.
        batch_size: windows or examples scored at once on one rank. Never changes a score.
        max_length: tokens of context; unset: the model's.
        limit: score only the first so many documents or examples.
        num_fewshot: examples before each question of lm-evaluation-harness; unset: as the task has it.
        output: folder for ``results.json``; unset: ``MODEL/evaluate`` for a run folder, else none.
        tensor: tensor-parallel size; the ranks left over share the data.
        tokenizer: instead of the one beside the model.
        task_keys: `task.*` recipe keys given by hand (columns, labels); the fine-tuned run's own recipe fills the rest.
        watermark_ratio, watermark_scheme, watermark_context, watermark_key: of the watermark that is looked for; see
            ``GenerateRequest``.
        watermark_z: a text has it where its z-score is larger.
        retrieval: what the task `retrieval` scores, for which ``model`` is a name; None: another task.
    """

    model: str
    tasks: tuple[str, ...]
    data: tuple[str, ...] = ()
    stride: int | None = None
    batch_size: int = 8
    max_length: int | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    output: str | None = None
    format: OutputFormat = "text"
    seed: int = 1234
    tensor: int = 1
    precision: Precision = "auto"
    tokenizer: str | None = None
    task_keys: tuple[tuple[str, Any], ...] = ()
    ensemble: tuple[str, ...] = ()
    watermark_ratio: float = 0.25
    watermark_scheme: WatermarkScheme = "lefthash"
    watermark_context: int | None = None
    watermark_key: str | None = None
    watermark_z: float = 4.0
    retrieval: RetrievalSection | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the ``config`` part of ``results.json``."""
        return _plain(self)


@dataclass(frozen=True)
class GenerateRequest:
    """Continue prompts with ``model``.

    Attributes:
        model: run folder, checkpoint folder, Hugging Face folder, one of Megatron-LM, or Hub name.
        prompts: texts given as ``--prompt``; empty: read ``prompts_file``, standard input or the terminal.
        prompts_file: JSONL with ``prompt`` (or ``text``) and optionally ``id`` a line; ``-`` is standard input.
        interactive: talk on the terminal until end of input.
        serve: answer requests over HTTP instead, on ``host`` and ``port`` (0: any that is free).
        max_new_tokens: tokens a prompt may grow by.
        temperature: 0 is greedy.
        top_k: 0 keeps every token.
        top_p: 1 keeps every token.
        repetition_penalty: 1 is none; over 1 makes what was already said less likely (CTRL, Keskar et al. 2019).
        beams: hypotheses of a beam search; 1 is none.
        length_penalty: of a beam search: scores are divided by length to this power.
        contrastive_alpha: of a contrastive search among the ``top_k`` likeliest tokens; 0 is none.
        stop: generation ends before the first of these strings.
        batch_size: prompts decoded at once. Never changes a greedy answer.
        as_trained: put prompts between the prefix and suffix that the model was fine-tuned with.
        watermark_bias: added to the scores of green tokens; 0 is no watermark.
        watermark_ratio: share of the vocabulary that is green.
        watermark_scheme: what seeds a green list.
        watermark_context: tokens that seed it; None: as many as is usual for the scheme.
        watermark_key: where the secret is (``env:NAME`` or ``file:PATH``), never the secret itself.
        provenance: say in each JSON answer what wrote it.
        output: file that the answers go to instead of standard output.
        tensor: tensor-parallel size; must be the number of ranks.
        tokenizer: instead of the one beside the model.
        retrieval: the knowledge base whose passages stand before each prompt; None: there is none.
    """

    model: str
    prompts: tuple[str, ...] = ()
    prompts_file: str | None = None
    interactive: bool = False
    serve: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    beams: int = 1
    length_penalty: float = 1.0
    contrastive_alpha: float = 0.0
    stop: tuple[str, ...] = ()
    batch_size: int = 8
    as_trained: bool = True
    watermark_bias: float = 0.0
    watermark_ratio: float = 0.25
    watermark_scheme: WatermarkScheme = "lefthash"
    watermark_context: int | None = None
    watermark_key: str | None = None
    provenance: bool = False
    output: str | None = None
    format: OutputFormat = "text"
    seed: int = 1234
    tensor: int = 1
    precision: Precision = "auto"
    tokenizer: str | None = None
    retrieval: RetrievalSection | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the record of what was asked."""
        return _plain(self)


def _plain(request: EvaluateRequest | GenerateRequest) -> dict[str, Any]:
    values = asdict(request)
    if request.retrieval is not None:
        values["retrieval"] = request.retrieval.model_dump(mode="json")
    return values
