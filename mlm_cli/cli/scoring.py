"""What `mlm evaluate` and `mlm generate` share: a request instead of a recipe, ranks, dry run, job."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mlm_cli.cli.output import emit, emit_json
from mlm_cli.errors import UsageError

if TYPE_CHECKING:
    from mlm_cli.config.schema import Recipe
    from mlm_cli.launch.start import Ranks

# Fields that both requests have, and the recipe key each is read from.
MODEL_KEYS: dict[str, Callable[[Recipe], Any]] = {
    "seed": lambda recipe: recipe.seed,
    "tensor": lambda recipe: recipe.parallel.tensor,
    "precision": lambda recipe: recipe.train.precision,
    "tokenizer": lambda recipe: recipe.tokenizer,
}


def run_request(
    verb: str,
    make: Callable[[Recipe, Ranks], Any],
    job: Callable[[Any], int | None],
    *,
    spec: str | None,
    overrides: list[str],
    flags: dict[str, Any],
    nproc: int | None,
    hostfile: str | None,
    dry_run: bool,
    format: str,
    share_terminal: bool = False,
) -> int:
    """Resolve recipe keys, make the request of them, then run ``job(request)`` on every rank."""
    from mlm_cli.config.resolve import resolve_recipe
    from mlm_cli.launch.start import find_ranks, run

    ranks = find_ranks(nproc, hostfile)
    tensor_given = any(text.startswith("parallel.tensor=") for text in overrides)
    if verb == "generate" and not tensor_given and spec is None:
        flags = {**flags, "parallel.tensor": ranks.world_size}
    recipe = resolve_recipe(spec, overrides, overlay=flags, verb=verb, world_size=ranks.world_size)
    if recipe.parallel.pipeline > 1 and any(text.startswith("parallel.pipeline=") for text in overrides):
        raise UsageError(
            f"`mlm {verb}` has no pipeline stages",
            hint="models of any layout are read at any tensor size: give parallel.tensor instead",
        )
    request = make(recipe, ranks)
    if dry_run:
        _dry_run(verb, request, ranks, format)
        return 0
    return run(ranks, lambda: job(request), share_terminal=share_terminal)


def _dry_run(verb: str, request: Any, ranks: Ranks, format: str) -> None:
    command = ranks.command()
    if format == "json":
        emit_json({"verb": verb, "ranks": ranks.world_size, "command": command, "request": request.to_dict()})
        return
    emit(f"would {verb} with {request.model}")
    emit(f"ranks  {ranks.describe()}")
    if command:
        emit(f"command  {shlex.join(command)}")
    for name, value in request.to_dict().items():
        if value not in (None, (), [], "") and name != "model":
            emit(f"{name}  {value}")
