"""`mlm pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlm_cli import log
from mlm_cli.cli.app import begin
from mlm_cli.cli.flags import (
    DryRunFlag,
    Format,
    FormatFlag,
    HostfileFlag,
    KeysArgument,
    NprocFlag,
    OutputFlag,
    QuietFlag,
    RecipeArgument,
    RecipeFlag,
    SeedFlag,
    VerboseFlag,
    split_recipe,
)
from mlm_cli.cli.output import emit, emit_json
from mlm_cli.cli.training import train
from mlm_cli.errors import UsageError

if TYPE_CHECKING:
    from mlm_cli.config.schema import Recipe

VerifyFlag = Annotated[
    bool, typer.Option("--verify", help="Of a run folder: does resuming give its newest checkpoint again, bit for bit?")
]
ReplayFlag = Annotated[
    int | None, typer.Option("--replay", min=1, metavar="STEP", help="Of a run folder: take this step again, and tell.")
]


def pretrain(
    recipe_or_key: RecipeArgument = None,
    keys: KeysArgument = None,
    recipe: RecipeFlag = None,
    output: OutputFlag = None,
    nproc: NprocFlag = None,
    hostfile: HostfileFlag = None,
    dry_run: DryRunFlag = False,
    format: FormatFlag = "text",
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
    seed: SeedFlag = None,
    verify: VerifyFlag = False,
    replay: ReplayFlag = None,
) -> int:
    """Train a language model from scratch, or resume a run.

    RECIPE is a file, a run folder or a built-in name (`mlm recipe ls`). Every setting is a recipe key; KEY=VALUE
    changes one, such as train.steps=100. Giving the same command again resumes from the latest checkpoint.

    \b
    Examples:
      mlm pretrain debug/gpt data.path=data/book --output runs/first
      mlm pretrain gpt/355m tokenizer=tok data.path=data/wiki --nproc 8
      mlm pretrain my.yaml parallel.tensor=2 train.precision=fp32 --nproc 2 --dry-run
      torchrun --nproc-per-node 8 -m mlm_cli pretrain my.yaml
      mlm pretrain runs/first --verify
      mlm pretrain runs/first --replay 120
    """
    begin(quiet=quiet, verbose=verbose)
    if verify or replay is not None:
        if verify and replay is not None:
            raise UsageError("`--verify` and `--replay` are both given", hint="one at a time")
        for flag, given in (("--output", output), ("--hostfile", hostfile), ("--dry-run", dry_run), ("--seed", seed)):
            if given:
                what = "--verify" if verify else "--replay"
                raise UsageError(f"`{what}` starts nothing new, so `{flag}` has no meaning", hint=f"leave out `{flag}`")
        return _replay(recipe_or_key, keys, recipe, nproc, replay, format)
    return train(
        "pretrain",
        _job,
        recipe_or_key,
        keys,
        recipe=recipe,
        output=output,
        nproc=nproc,
        hostfile=hostfile,
        dry_run=dry_run,
        format=format,
        seed=seed,
        check=_check,
    )


def _check(recipe: Recipe) -> None:
    from mlm_cli.launch.inputs import check_pretraining_data

    check_pretraining_data(recipe)


def _job(recipe: Recipe) -> int | None:
    from mlm_cli.jobs import pretrain as job

    return job.run(recipe)


def _replay(
    first: str | None, rest: list[str] | None, recipe: str | None, nproc: int | None, step: int | None, format: Format
) -> int:
    """Take steps of a run again and compare; the run folder stays as it is."""
    from mlm_cli.config.requests import ReplayRequest
    from mlm_cli.config.resolve import resolve_recipe
    from mlm_cli.launch.start import find_ranks, run

    spec, overrides = split_recipe(first, rest, recipe, verb="pretrain")
    if not Path(spec, "recipe.yaml").is_file():
        raise UsageError(
            f"`{spec}` is no run folder: it holds no recipe.yaml",
            hint="mlm pretrain runs/NAME --verify, or --replay STEP",
        )
    folder = str(Path(spec).expanduser().absolute())
    ranks = find_ranks(nproc, None)
    resolved = resolve_recipe(spec, overrides, overlay={"output": folder}, verb="pretrain", world_size=ranks.world_size)
    request = ReplayRequest(folder, step)

    def body() -> None:
        from mlm_cli.jobs import replay as job

        report, tells = job.run(resolved, request)
        if tells:
            emit_json(report.to_dict()) if format == "json" else emit(report.as_text())
        if step is None:
            job.check(report)
            if tells:
                log.info(f"verified: step {report.step} gives the same loss and the same state, bit for bit")

    return run(ranks, body)
