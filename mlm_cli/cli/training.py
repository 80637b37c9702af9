"""What `mlm pretrain` and `mlm finetune` share: recipe, ranks, dry run, job."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlm_cli.cli.flags import Format, overlay, split_recipe
from mlm_cli.cli.output import emit, emit_json


def train(
    verb: str,
    job: Callable[[Any], int | None],
    first: str | None,
    rest: list[str] | None,
    *,
    recipe: str | None,
    output: str | None,
    nproc: int | None,
    hostfile: str | None,
    dry_run: bool,
    format: Format,
    seed: int | None,
    check: Callable[[Any], None] | None = None,
) -> int:
    """Resolve and check the recipe for the ranks there will be, then run ``job(recipe)`` on each of them.

    ``check(recipe)`` raises for what can be seen to be wrong before any rank is started on this machine.
    """
    from mlm_cli.config.resolve import resolve_recipe
    from mlm_cli.launch.start import find_ranks, is_follower, run

    spec, overrides = split_recipe(first, rest, recipe, verb=verb)
    ranks = find_ranks(nproc, hostfile)
    resolved = resolve_recipe(
        spec, overrides, overlay=overlay(output=output, seed=seed), verb=verb, world_size=ranks.world_size
    )
    if dry_run:
        _dry_run(verb, resolved, ranks, format)
        return 0
    if ranks.how in ("here", "local"):
        from mlm_cli.launch.inputs import check_output

        check_output(resolved.output)
        if check is not None:
            check(resolved)
    code = run(ranks, lambda: job(resolved), run_folder=resolved.output)
    speaks = ranks.how != "hosts" and not is_follower()
    if format == "json" and resolved.output is not None and speaks:
        emit(Path(resolved.output, "status.json").read_text(encoding="utf-8"))
    return code


def _dry_run(verb: str, recipe: Any, ranks: Any, format: Format) -> None:
    """The plan and the processes; for fine-tuning the model is known only from `init_from`, so there is no plan."""
    from mlm_cli.launch.plan import as_text, make_plan

    command = ranks.command()
    plan = make_plan(recipe, ranks.world_size) if verb == "pretrain" else None
    if format == "json":
        planned = None if plan is None else plan.to_dict()
        values = recipe.model_dump(mode="json", exclude_none=True)
        emit_json(
            {
                "verb": verb,
                "ranks": ranks.world_size,
                "command": command,
                "plan": planned,
                "recipe": values,
            }
        )
        return
    emit(f"would {verb} in {recipe.output}")
    emit(f"ranks          {ranks.describe()}")
    if command:
        emit(f"command        {shlex.join(command)}")
    if plan is not None:
        emit(as_text(plan))
    else:
        emit(f"model          {recipe.init_from}")
        emit(f"task           {recipe.task.name} on {recipe.task.train}, scored on {recipe.task.dev}")
