"""`mlm preprocess --recipe`: the recipe keys that stand for its flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlm_cli.cli.flags import is_key_value

if TYPE_CHECKING:
    from mlm_cli.config.clean_section import CleanSection


@dataclass(frozen=True)
class Merged:
    """What flags and recipe say together."""

    inputs: tuple[str, ...]
    tokenizer: str | None
    output: str | None
    json_key: tuple[str, ...]
    append_eod: bool
    on_bad_line: Literal["stop", "skip"]
    workers: int | None
    clean: CleanSection


def inputs_and_keys(arguments: Sequence[str] | None) -> tuple[tuple[str, ...], list[str]]:
    """Inputs, and KEY=VALUE; a file that is there is an input whatever its name."""
    given = list(arguments or ())
    keys = [text for text in given if is_key_value(text) and not Path(text).exists()]
    return tuple(text for text in given if text not in keys), keys


def from_recipe(recipe: str | None, keys: list[str], inputs: Sequence[str], flags: Mapping[str, Any]) -> Merged:
    """Lay the flags that were given over the recipe.

    Raises:
        UsageError: every mistake of the recipe at once.
    """
    from mlm_cli.config.resolve import resolve_recipe

    top = ("tokenizer", "output")
    overlay = {key if key in top else f"preprocess.{key}": value for key, value in flags.items()}
    json_key = overlay.pop("preprocess.json_key", None)
    if inputs:
        overlay["preprocess.inputs"] = list(inputs)
    found = resolve_recipe(recipe, keys, overlay=overlay, verb="preprocess")
    section = found.preprocess
    return Merged(
        inputs=section.inputs,
        tokenizer=found.tokenizer,
        output=found.output,
        json_key=tuple(json_key or (section.json_key,)),
        append_eod=section.append_eod,
        on_bad_line=section.on_bad_line,
        workers=section.workers,
        clean=section.clean,
    )
