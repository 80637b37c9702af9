"""`mlm pretrain`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlm_cli.cli.app import begin
from mlm_cli.cli.flags import (
    DryRunFlag,
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
)
from mlm_cli.cli.training import train

if TYPE_CHECKING:
    from mlm_cli.config.schema import Recipe


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
    """
    begin(quiet=quiet, verbose=verbose)
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
    )


def _job(recipe: Recipe) -> int | None:
    from mlm_cli.jobs import pretrain as job

    return job.run(recipe)
