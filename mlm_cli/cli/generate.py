"""`mlm generate`."""

from __future__ import annotations

import sys
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
    from mlm_cli.config.requests import GenerateRequest
    from mlm_cli.config.schema import Recipe


def generate(
    model_or_key: ModelArgument = None,
    keys: KeysArgument = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="What to continue; may be repeated.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", metavar="FILE", help="JSONL with a `prompt` a line; - is stdin.")
    ] = None,
    interactive: Annotated[bool, typer.Option("--interactive", help="Talk on the terminal until Ctrl-D.")] = False,
    serve: Annotated[bool, typer.Option("--serve", help="Answer completions over HTTP, as OpenAI's API.")] = False,
    host: Annotated[
        str | None, typer.Option("--host", metavar="ADDRESS", help="Where --serve listens; unset: 127.0.0.1.")
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65535, metavar="N", help="Of --serve; unset: 8000, 0: any free.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, metavar="N", help="Tokens to add, at most.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0.0, metavar="T", help="0 is greedy.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=0, metavar="K", help="Choose among the K likeliest; 0: all.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", max=1.0, metavar="P", help="Sample from the likeliest that hold P."),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option("--repetition-penalty", metavar="R", help="Over 1: less of what was said."),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text; may be repeated.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, metavar="N", help="Prompts at once.")] = None,
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
    """Continue prompts with a model.

    MODEL is a run, checkpoint or Hugging Face folder, one of Megatron-LM, or a Hub name.
    Without --prompt, --prompts or --interactive the prompt is read from standard input. With --format json each answer
    is one JSON line, in the order of the prompts. --nproc N slices the model over N ranks. --serve answers
    POST /v1/completions (also streamed), --batch-size requests at once, until Ctrl-C. generate.beams=N looks for the
    likeliest answer by beam search, generate.contrastive_alpha=A for one that does not repeat itself among the --top-k
    likeliest tokens. generate.watermark_bias=2 marks the text so that who has the key can tell it later
    (`mlm evaluate --task watermark`); generate.provenance=true says in each JSON line what wrote it.
    retrieval.documents=FILES puts the passages of these files that fit a prompt best before it.

    \b
    Examples:
      mlm generate runs/gpt --prompt "def main(" --max-new-tokens 64
      mlm generate runs/gpt --prompts questions.jsonl --temperature 0 --format json > answers.jsonl
      echo "Once upon a time" | mlm generate runs/gpt --top-p 0.9 --seed 7
      mlm generate runs/t5 --prompts texts.jsonl generate.beams=4
      mlm generate runs/gpt --prompt "The " generate.contrastive_alpha=0.6 --top-k 4
      mlm generate runs/gpt --prompt "The " generate.watermark_bias=2 generate.watermark_key=env:KEY
      mlm generate runs/gpt --prompt "Who may sign orders?" retrieval.documents=handbook/
      mlm generate runs/gpt --interactive --nproc 2
      mlm generate runs/gpt --serve --port 8000 --batch-size 16
    """
    begin(quiet=quiet, verbose=verbose)
    words, overrides = split_arguments(model_or_key, keys)
    if len(words) > 1:
        raise UsageError(f"`{words[1]}` is not KEY=VALUE", hint='mlm generate MODEL --prompt "TEXT" [KEY=VALUE]...')
    sampling = overlay(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        stop=stop or None,
        batch_size=batch_size,
    )
    flags = overlay(seed=seed, output=output) | {f"generate.{key}": value for key, value in sampling.items()}
    source = _source(prompt, prompts, interactive, serve)
    way: dict[str, Any] = {"prompts": tuple(prompt or ()), "prompts_file": source, "interactive": interactive}
    where = overlay(host=host, port=port)
    if serve:
        way |= {"serve": True, **where}
        if format != "text":
            raise UsageError("`--serve` answers in JSON whatever `--format` says", hint="leave --format out")
    elif where:
        raise UsageError(f"`--{next(iter(where))}` is for `--serve`", hint="add --serve, or leave it out")
    return run_request(
        "generate",
        lambda resolved, ranks: _request(resolved, words, way, format),
        _job,
        spec=recipe,
        overrides=overrides,
        flags=flags,
        nproc=nproc,
        hostfile=hostfile,
        dry_run=dry_run,
        format=format,
        share_terminal=interactive,
    )


def _job(request: GenerateRequest) -> int | None:
    from mlm_cli.jobs import generate as job

    return job.run(request)


def _source(prompt: list[str] | None, prompts: str | None, interactive: bool, serve: bool) -> str | None:
    """Where prompts are read from, beside ``--prompt``.

    Raises:
        UsageError: none, or more than one.
    """
    ways = {"--prompt": prompt, "--prompts": prompts, "--interactive": interactive, "--serve": serve}
    given = [name for name, value in ways.items() if value]
    if len(given) > 1:
        raise UsageError(f"`{given[0]}` and `{given[1]}` exclude each other", hint="use one of them")
    if not given and sys.stdin is not None and sys.stdin.isatty():
        raise UsageError("no prompt", hint='add `--prompt "TEXT"`, `--prompts FILE`, `--interactive` or `--serve`')
    return prompts


def _request(recipe: Recipe, words: list[str], way: dict[str, Any], format: str) -> GenerateRequest:
    from mlm_cli.config.requests import GenerateRequest

    model = words[0] if words else recipe.init_from
    if model is None:
        raise UsageError("no model given", hint='mlm generate MODEL --prompt "TEXT"')
    return GenerateRequest(
        model=model,
        **way,
        output=recipe.output,
        format="json" if format == "json" else "text",
        **recipe.generate.model_dump(),
        retrieval=recipe.retrieval if recipe.retrieval.documents else None,
        **{name: read(recipe) for name, read in MODEL_KEYS.items()},
    )
