"""`mlm finetune`."""

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


def finetune(
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
    """Fine-tune a pretrained model on a task.

    The recipe names the model (`init_from`), the files and columns (`task`), and everything `mlm pretrain` takes.

    \b
    Examples:
      mlm finetune finetune/sst2 init_from=runs/gpt task.train=train.tsv task.dev=dev.tsv -o runs/sst2
      mlm finetune finetune/squad init_from=runs/bert task.train=train-v1.1.json task.dev=dev-v1.1.json
      mlm finetune finetune/multi30k init_from=google-t5/t5-base task.train=train task.dev=val
      mlm finetune my.yaml optimizer.lr=3e-5 task.epochs=2
      mlm evaluate runs/sst2 --task classification --data dev.tsv
    """
    begin(quiet=quiet, verbose=verbose)
    return train(
        "finetune",
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
    from mlm_cli.jobs import finetune as job

    return job.run(recipe)
