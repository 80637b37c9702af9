"""Flags that verbs share, each defined once, and how RECIPE and KEY=VALUE arguments are told apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mlm_cli.errors import UsageError

RecipeFlag = Annotated[
    str | None, typer.Option("--recipe", metavar="FILE", help="Recipe file or built-in name, instead of RECIPE.")
]
OutputFlag = Annotated[str | None, typer.Option("--output", "-o", metavar="PATH", help="Where results go.")]
NprocFlag = Annotated[
    int | None,
    typer.Option("--nproc", min=1, metavar="N", help="Start N ranks on this machine (with --hostfile: on each)."),
]
HostfileFlag = Annotated[
    str | None,
    typer.Option("--hostfile", metavar="FILE", help="Start ranks on these hosts through DeepSpeed's launcher."),
]
DryRunFlag = Annotated[bool, typer.Option("--dry-run", help="Say what would run, and stop.")]
Format = Literal["text", "json"]
FormatFlag = Annotated[Format, typer.Option("--format", help="Of what is written to stdout.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="Say only warnings and errors.")]
VerboseFlag = Annotated[bool, typer.Option("--verbose", "-v", help="Say more; tracebacks for errors.")]
SeedFlag = Annotated[int | None, typer.Option("--seed", min=0, metavar="N", help="The recipe's `seed`.")]
# Hidden from the list of options, because every verb's text explains its own.
RecipeArgument = Annotated[str | None, typer.Argument(metavar="RECIPE", hidden=True)]
ModelArgument = Annotated[str | None, typer.Argument(metavar="MODEL", hidden=True)]
KeysArgument = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", hidden=True)]

_KEY_VALUE = re.compile(r"[A-Za-z_][\w.]*=")


def is_key_value(text: str) -> bool:
    """True for ``train.steps=10``; a file whose name has such a form must be given as ``./NAME``."""
    return _KEY_VALUE.match(text) is not None


def split_arguments(first: str | None, rest: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Words, and KEY=VALUE overrides, each in their order."""
    given = [text for text in (first, *(rest or ())) if text is not None]
    return [text for text in given if not is_key_value(text)], [text for text in given if is_key_value(text)]


def split_recipe(
    first: str | None, rest: Sequence[str] | None, recipe: str | None, *, verb: str
) -> tuple[str, list[str]]:
    """RECIPE (or ``--recipe``) and the overrides.

    Raises:
        UsageError: no recipe, two of them, or an argument that is neither.
    """
    words, overrides = split_arguments(first, rest)
    if recipe is not None:
        words.insert(0, recipe)
    if not words:
        raise UsageError(
            "no recipe given", hint=f"for example `mlm {verb} debug/gpt`; `mlm recipe ls` lists the built-in ones"
        )
    if len(words) > 1:
        what = "two recipes" if Path(words[1]).exists() or "/" in words[1] else "an argument that is not KEY=VALUE"
        raise UsageError(f"{what}: `{words[0]}` and `{words[1]}`", hint=f"mlm {verb} RECIPE [KEY=VALUE]...")
    return words[0], overrides


def overlay(**flags: Any) -> dict[str, Any]:
    """Flags that stand for recipe keys, those given."""
    return {key: value for key, value in flags.items() if value is not None}
