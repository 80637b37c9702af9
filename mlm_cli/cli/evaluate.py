"""`mlm evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlm_cli.cli.app import begin
from mlm_cli.cli.flags import (
    DryRunFlag,
    FormatFlag,
    HostfileFlag,
    KeysArgument,
    ModelArgument,
    NprocFlag,
    OutputFlag,
    QuietFlag,
    RecipeFlag,
    SeedFlag,
    VerboseFlag,
    overlay,
    split_arguments,
)
from mlm_cli.cli.scoring import MODEL_KEYS, run_request
from mlm_cli.errors import UsageError

if TYPE_CHECKING:
    from mlm_cli.config.requests import EvaluateRequest
    from mlm_cli.config.retrieval_section import RetrievalSection
    from mlm_cli.config.schema import Recipe

_WATERMARK = ("ratio", "scheme", "context", "key")  # what is looked for is what `mlm generate` was told to write


def evaluate(
    model_or_key: ModelArgument = None,
    keys: KeysArgument = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", metavar="NAME", help="perplexity or a kind of task; may be repeated.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="FILE", help="Text, indexed prefix or labelled file; may be repeated."),
    ] = None,
    ensemble: Annotated[
        bool, typer.Option("--ensemble", help="Average the probabilities of all models named.")
    ] = False,
    stride: Annotated[
        int | None,
        typer.Option("--stride", min=1, metavar="N", help="perplexity: tokens scored a window; unset: no overlap."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, metavar="N", help="Windows at once; never changes a score.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="N", help="Only the first N documents or examples.")
    ] = None,
    recipe: RecipeFlag = None,
    output: OutputFlag = None,
    nproc: NprocFlag = None,
    hostfile: HostfileFlag = None,
    dry_run: DryRunFlag = False,
    format: FormatFlag = "text",
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
    seed: SeedFlag = None,
) -> int:
    """Score a model and write results.json.

    MODEL is a run, checkpoint or Hugging Face folder, one of Megatron-LM, or a Hub name.
    Files named after it count as --data, so that a shell pattern works; with --ensemble they are further models, whose
    answers are averaged with its own (language models must share a tokenizer, classifiers their label names).
    Recipe keys that matter here are task.*, evaluate.max_length (tokens of context, for perplexity), tokenizer,
    parallel.tensor and train.precision. Kinds of task, for models that `mlm finetune` made: classification,
    regression, token_classification, question_answering, multiple_choice, embedding; and, for any model that writes:
    translation, summarization, text_generation. A language model as it is: lambada, ranked_choice, lm_eval:NAME (a task
    of lm-evaluation-harness), and which stereotypes it prefers (gpt, bert): crows_pairs, stereoset.
    watermark finds texts that were written with generate.watermark_bias and the same generate.watermark_key; of the
    model it reads the tokenizer alone.
    What finds passages for `mlm generate` (retrieval.* keys): retrieval, by a MODEL's embeddings, or without MODEL by
    BM25.

    \b
    Examples:
      mlm evaluate runs/gpt --task perplexity --data held-out.txt --stride 512
      mlm evaluate runs/gpt --task perplexity --data data/valid parallel.tensor=2 --nproc 2
      mlm evaluate runs/sst2 --task classification --data dev.tsv --format json
      mlm evaluate runs/squad --task question_answering --data dev-v1.1.json -o results/squad
      mlm evaluate runs/de --task translation --data test_2016_flickr -o results/de
      mlm evaluate runs/gpt --task lambada --data lambada_test.jsonl
      mlm evaluate runs/gpt --task lm_eval:arc_easy evaluate.num_fewshot=5
      mlm evaluate runs/bert --task crows_pairs --data crows_pairs_anonymized.csv -o results/bias
      mlm evaluate runs/gpt --task watermark --data answers.jsonl generate.watermark_key=env:KEY -o results/mark
      mlm evaluate --task retrieval --data dev-v1.1.json retrieval.passage_words=50
      mlm evaluate --ensemble runs/a runs/b runs/c --task classification --data dev.tsv
      mlm evaluate openai-community/gpt2 --task perplexity --data *.txt -o results/gpt2
    """
    begin(quiet=quiet, verbose=verbose)
    words, overrides = split_arguments(model_or_key, keys)
    files = [*(data or ()), *([] if ensemble else words[1:])]
    if ensemble and len(words) < 2:
        raise UsageError(
            "an ensemble has two or more models", hint="mlm evaluate --ensemble A B --task NAME --data FILE"
        )
    asked = overlay(tasks=task, data=files or None, stride=stride, micro_batch_size=batch_size, limit=limit)
    flags = overlay(seed=seed, output=output) | {f"evaluate.{key}": value for key, value in asked.items()}
    return run_request(
        "evaluate",
        lambda resolved, ranks: _request(resolved, words, _task_keys(overrides), format, ensemble),
        _job,
        spec=recipe,
        overrides=[text for text in overrides if not text.startswith("task.")],
        flags=flags,
        nproc=nproc,
        hostfile=hostfile,
        dry_run=dry_run,
        format=format,
    )


def _job(request: EvaluateRequest) -> int | None:
    from mlm_cli.jobs import evaluate as job

    return job.run(request)


def _request(
    recipe: Recipe, words: list[str], task_keys: dict[str, Any], format: str, ensemble: bool
) -> EvaluateRequest:
    from mlm_cli.config.requests import HARNESS, RETRIEVAL, TAKES_MAX_LENGTH, EvaluateRequest, check_tasks

    model = words[0] if words else recipe.init_from
    retrieval = _retrieval(recipe, model, ensemble) if RETRIEVAL in recipe.evaluate.tasks else None
    if retrieval is not None:
        model = retrieval.embedding_model or retrieval.retriever
    if model is None:
        raise UsageError("no model given", hint="mlm evaluate MODEL --task NAME; MODEL is a run folder, for example")
    for word in () if ensemble else words[1:]:
        if not Path(word).exists() and not list(Path(word).parent.glob(f"{Path(word).name}*.idx")):
            raise UsageError(
                f"`{word}` is neither KEY=VALUE nor a file",
                hint="what files begin with is given as `--data NAME`, several tasks as `--task A --task B`",
            )
    if not recipe.evaluate.tasks:
        raise UsageError("no task given", hint="add `--task perplexity` or `--task classification`")
    check_tasks(recipe.evaluate.tasks, recipe.evaluate.data)
    for task in recipe.evaluate.tasks if recipe.evaluate.max_length is not None else ():
        if task not in TAKES_MAX_LENGTH and not task.startswith(HARNESS):
            raise UsageError(f"evaluate.max_length is not for {task}", hint="fine-tuned tasks have task.max_length")
    if recipe.evaluate.num_fewshot is not None and not all(task.startswith(HARNESS) for task in recipe.evaluate.tasks):
        raise UsageError(f"evaluate.num_fewshot is for {HARNESS}NAME", hint="put examples into the contexts of others")
    from_recipe = recipe.task.model_dump(exclude_unset=True) if recipe.task else {}
    return EvaluateRequest(
        model=model,
        tasks=recipe.evaluate.tasks,
        data=recipe.evaluate.data,
        stride=recipe.evaluate.stride,
        max_length=recipe.evaluate.max_length,
        limit=recipe.evaluate.limit,
        num_fewshot=recipe.evaluate.num_fewshot,
        output=recipe.output,
        batch_size=recipe.evaluate.micro_batch_size or EvaluateRequest.batch_size,
        format="json" if format == "json" else "text",
        ensemble=tuple(words[1:]) if ensemble else (),
        retrieval=retrieval,
        task_keys=tuple({**from_recipe, **task_keys}.items()),
        watermark_z=recipe.evaluate.watermark_z,
        **{f"watermark_{key}": getattr(recipe.generate, f"watermark_{key}") for key in _WATERMARK},
        **{name: read(recipe) for name, read in MODEL_KEYS.items()},
    )


def _retrieval(recipe: Recipe, model: str | None, ensemble: bool) -> RetrievalSection:
    """What the task `retrieval` scores: ``model``'s embeddings, or else what the keys say.

    Raises:
        UsageError: other tasks or models beside it; keys that it does not read.
    """
    section = recipe.retrieval
    if len(recipe.evaluate.tasks) > 1 or ensemble:
        raise UsageError("retrieval is scored by itself", hint="evaluate other tasks and models with another command")
    for key in ("documents", "index"):
        if getattr(section, key):
            raise UsageError(
                f"`retrieval.{key}` is not for --task retrieval, which looks among the texts of its questions",
                hint="leave it out",
            )
    if model is None:
        return section
    if Path(model).is_file():
        raise UsageError(f"`{model}` is a file, and no model", hint="give files of questions with --data")
    if section.embedding_model is not None:
        raise UsageError(f"`{model}` and `retrieval.embedding_model` are two models", hint="name one of them")
    return section.model_copy(update={"retriever": "dense", "embedding_model": model})


def _task_keys(overrides: list[str]) -> dict[str, Any]:
    """`task.*` overrides: columns and labels of a data file, without the training files that a whole section needs."""
    from mlm_cli.config.schema import TaskSection
    from mlm_cli.config.yaml_text import parse_value

    found: dict[str, Any] = {}
    for text in overrides:
        key, _, value = text.partition("=")
        name = key.removeprefix("task.")
        if key.startswith("task."):
            if name not in TaskSection.model_fields:
                from mlm_cli.config.keys import suggest

                near = suggest(key)
                raise UsageError(f"`{key}` is not a recipe key", hint=f"did you mean `{near}`?" if near else None)
            found[name] = parse_value(value)
    return found
