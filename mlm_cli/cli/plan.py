"""`mlm plan`."""

from __future__ import annotations

from typing import Annotated

import typer

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
    overlay,
    split_recipe,
)
from mlm_cli.cli.output import emit, emit_json


def plan(
    recipe_or_key: RecipeArgument = None,
    keys: KeysArgument = None,
    device_tflops: Annotated[
        float | None,
        typer.Option("--device-tflops", metavar="X", help="Peak TFLOP/s of one rank's device; gives the time."),
    ] = None,
    mfu: Annotated[
        float, typer.Option("--mfu", min=0.01, max=1.0, metavar="SHARE", help="Share of the peak that is reached.")
    ] = 0.4,
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
    """Say what a recipe needs: ranks, memory, FLOPs, time.

    Starts nothing and needs no GPU. Without --nproc the ranks are the fewest that hold the model once.

    \b
    Examples:
      mlm plan gpt/8.3b --nproc 512 --device-tflops 125
      mlm plan gpt/355m train.micro_batch_size=16 train.recompute=full
      mlm plan my.yaml --format json
    """
    from mlm_cli.config.derived import model_parallel_size
    from mlm_cli.config.resolve import resolve_recipe
    from mlm_cli.errors import UsageError
    from mlm_cli.launch.plan import as_text, make_plan
    from mlm_cli.launch.start import find_ranks

    begin(quiet=quiet, verbose=verbose)
    if device_tflops is not None and not device_tflops > 0:
        raise UsageError(f"`--device-tflops` must be above 0; it is {device_tflops:g}", hint="989 for an H100 in bf16")
    spec, overrides = split_recipe(recipe_or_key, keys, recipe, verb="plan")
    flags = overlay(output=output, seed=seed)
    world_size = find_ranks(nproc, hostfile).world_size if nproc or hostfile else None
    resolved = resolve_recipe(spec, overrides, overlay=flags, verb="plan", world_size=world_size)
    if world_size is None:
        world_size = model_parallel_size(resolved)
        resolve_recipe(spec, overrides, overlay=flags, verb="plan", world_size=world_size)
    made = make_plan(resolved, world_size, device_tflops=device_tflops, mfu=mfu)
    if format == "json":
        emit_json(made.to_dict())
    else:
        emit(as_text(made))
    return 0
