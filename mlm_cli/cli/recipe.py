"""`mlm recipe ls|show|check|schema`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlm_cli.cli.app import begin, new_app
from mlm_cli.cli.flags import (
    FormatFlag,
    KeysArgument,
    OutputFlag,
    QuietFlag,
    RecipeArgument,
    RecipeFlag,
    VerboseFlag,
    split_recipe,
)
from mlm_cli.cli.output import emit, emit_json
from mlm_cli.errors import UsageError

if TYPE_CHECKING:
    from mlm_cli.config.schema import Recipe

recipe_app = new_app(help="List, show and check recipes.", context_settings={"help_option_names": ["-h", "--help"]})


@recipe_app.command("ls")
def list_recipes(
    pattern: Annotated[str, typer.Argument(metavar="[PREFIX]", help="Only names that begin so.")] = "",
    format: FormatFlag = "text",
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
) -> int:
    """List the built-in recipes and job scripts.

    \b
    Examples:
      mlm recipe ls
      mlm recipe ls gpt/ --format json
    """
    from mlm_cli.config.builtin import builtin_names, builtin_scripts, recipes_root
    from mlm_cli.config.resolve import read_draft

    begin(quiet=quiet, verbose=verbose)
    rows = []
    for name in builtin_names():
        if name.startswith(pattern):
            draft = read_draft(str(recipes_root() / f"{name}.yaml"), ())
            rows.append({"name": name, "description": draft.values.get("description", "")})
    rows += [
        {"name": name, "description": about} for name, about in builtin_scripts().items() if name.startswith(pattern)
    ]
    if not rows:
        raise UsageError(f"no built-in recipe begins with `{pattern}`", hint="`mlm recipe ls` lists them all")
    if format == "json":
        emit_json(rows)
        return 0
    width = max(len(row["name"]) for row in rows)
    emit("\n".join(f"{row['name']:<{width}}  {row['description']}" for row in rows))
    return 0


@recipe_app.command("show")
def show(
    recipe_or_key: RecipeArgument = None,
    keys: KeysArgument = None,
    recipe: RecipeFlag = None,
    output: OutputFlag = None,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Every key with its value, after bases and KEY=VALUE.")
    ] = False,
    format: FormatFlag = "text",
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
) -> int:
    """Print a recipe.

    Its file as written, or with --resolved or KEY=VALUE every key and its value.

    \b
    Examples:
      mlm recipe show debug/gpt > my.yaml
      mlm recipe show gpt/8.3b --resolved
      mlm recipe show gpt/355m parallel.tensor=2 -o my.yaml
      mlm recipe show slurm/pretrain.sh > pretrain.sh
    """
    from mlm_cli.config.builtin import builtin_scripts, find_recipe, recipes_root
    from mlm_cli.config.resolve import recipe_text, resolve_recipe, write_recipe

    begin(quiet=quiet, verbose=verbose)
    spec, overrides = split_recipe(recipe_or_key, keys, recipe, verb="recipe show")
    if spec in builtin_scripts():
        if overrides or resolved or output is not None or format == "json":
            raise UsageError(f"{spec} is a job script: it is printed as it is", hint=f"mlm recipe show {spec} > job.sh")
        emit((recipes_root() / spec).read_text(encoding="utf-8"))
        return 0
    found = resolve_recipe(spec, overrides)
    if output is not None:
        write_recipe(found, output)
    elif format == "json":
        emit_json(found.model_dump(mode="json", exclude_none=True))
    elif resolved or overrides:
        emit(recipe_text(found))
    else:
        emit(find_recipe(spec).read_text(encoding="utf-8"))
    return 0


@recipe_app.command("check")
def check_recipe(
    recipe_or_key: RecipeArgument = None,
    keys: KeysArgument = None,
    recipe: RecipeFlag = None,
    nproc: Annotated[
        int | None, typer.Option("--nproc", min=1, metavar="N", help="Also check that it fits N ranks.")
    ] = None,
    format: FormatFlag = "text",
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
) -> int:
    """Find every mistake of a recipe.

    Runs nothing; the exit code is 2 if there is a mistake.

    \b
    Examples:
      mlm recipe check my.yaml
      mlm recipe check gpt/8.3b parallel.tensor=16 --nproc 64
    """
    from mlm_cli.config.checks import check
    from mlm_cli.config.resolve import resolve_recipe

    begin(quiet=quiet, verbose=verbose)
    spec, overrides = split_recipe(recipe_or_key, keys, recipe, verb="recipe check")
    found = resolve_recipe(spec, overrides, verb="plan", world_size=nproc)
    verb = _meant_for(found)
    missing = [mistake.keys[0] for mistake in check(found, verb=verb)]
    document: dict[str, Any] = {"recipe": spec, "ok": True, "verb": verb, "still_to_be_given": missing}
    if format == "json":
        emit_json(document)
    else:
        emit(f"{spec}: no mistakes" + (f"; `mlm {verb}` still needs {', '.join(missing)}" if missing else ""))
    return 0


@recipe_app.command("schema")
def schema(
    format: FormatFlag = "text",
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
) -> int:
    """Print every recipe key with its default.

    With --format json that is a JSON schema, for editors.

    \b
    Examples:
      mlm recipe schema
      mlm recipe schema --format json > recipe.schema.json
    """
    from mlm_cli.config.keys import describe_keys
    from mlm_cli.config.schema import Recipe

    begin(quiet=quiet, verbose=verbose)
    if format == "json":
        emit_json(Recipe.model_json_schema())
        return 0
    emit("\n".join(describe_keys()))
    return 0


def _meant_for(recipe: Recipe) -> str:
    """The verb a recipe is for, by the sections it fills in."""
    if recipe.task is not None:
        return "finetune"
    if recipe.preprocess.inputs:
        return "preprocess"
    return "evaluate" if recipe.evaluate.tasks else "pretrain"
