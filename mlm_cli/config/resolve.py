"""From what the user named to one typed recipe: files, ``base:`` chains, overrides, and every mistake at once.

Precedence, weakest first: schema defaults, the ``base:`` recipe (and its own base), the recipe, ``KEY=VALUE``
overrides, flags such as ``--seed``. Sections merge key by key; lists and values replace; ``null`` puts a key back to
its default. A relative path means the same in a recipe and on the command line: relative to the working directory,
except ``base:``, which is looked for beside the recipe that names it. The resolved recipe holds absolute paths, so
that the ``recipe.yaml`` of a run folder is itself a recipe that works from anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mlm_cli.config import yaml_text
from mlm_cli.config.builtin import find_recipe
from mlm_cli.config.checks import check
from mlm_cli.config.explain import explain
from mlm_cli.config.keys import (
    OPTIONAL_SECTIONS,
    PATH_KEYS,
    PATH_OR_NAME_KEYS,
    SECRET_KEYS,
    section_of,
    suggest,
    written_out,
)
from mlm_cli.config.mistakes import Mistake, as_error
from mlm_cli.config.schema import Recipe
from mlm_cli.errors import ResourceError, UsageError

Key = tuple[str, ...]


@dataclass
class Draft:
    """Recipe values not yet checked, and where each key was last set."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Key, str] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)

    def where(self, keys: Iterable[str]) -> str | None:
        """Where the first of ``keys`` that anybody set was set; a key not set stands for the section around it."""
        for key in keys:
            path = tuple(key.split("."))
            if path in self.origins:
                return self.origins[path]
        return None

    def merge(self, values: Mapping[str, Any], origins: Mapping[Key, str]) -> None:
        """Lay ``values`` over what is there."""
        full = written_out(values)
        _merge(self.values, full)
        self.origins.update(origins)
        short = ("model", "attention")
        if full is not values and short in origins:
            self.origins[(*short, "kernel")] = origins[short]


def resolve_recipe(
    spec: str | None,
    overrides: Sequence[str] = (),
    *,
    overlay: Mapping[str, Any] | None = None,
    verb: str | None = None,
    world_size: int | None = None,
) -> Recipe:
    """Read, merge and check a recipe.

    Args:
        spec: file, run folder or built-in name; None starts from the schema's defaults.
        overrides: ``KEY=VALUE`` texts with dotted keys and YAML values.
        overlay: dotted keys that flags set; wins over everything.
        verb: also check what this verb needs (``pretrain``, ``finetune``, ...).
        world_size: also check that the layout and batch fit this many ranks.

    Raises:
        UsageError: every mistake found, each with file and line and a suggestion.
    """
    draft = read_draft(spec, overrides, overlay)
    recipe, wrong = _validate(draft)
    if verb is not None and recipe is not None:
        found = check(recipe, verb=verb, world_size=world_size)
        draft.mistakes += [mistake for mistake in found if not wrong.intersection(mistake.keys)]
    if draft.mistakes or recipe is None:
        raise as_error(Mistake(m.keys, m.message, m.hint, m.where or draft.where(m.keys)) for m in draft.mistakes)
    return recipe


def read_draft(spec: str | None, overrides: Sequence[str], overlay: Mapping[str, Any] | None = None) -> Draft:
    """Merge files, overrides and flags, without judging keys or values."""
    draft = Draft()
    if spec is not None:
        for file in reversed(_base_chain(find_recipe(spec))):
            _merge_file(draft, file)
    for text in overrides:
        _merge_override(draft, text)
    for key, value in (overlay or {}).items():
        path = tuple(key.split("."))
        draft.merge(_nested(path, value), {path: f"`--{path[-1].replace('_', '-')}`"})
    draft.values.pop("base", None)
    draft.values = _without_nulls(draft.values)
    _absolute_paths(draft.values)
    return draft


def write_recipe(recipe: Recipe, path: Path | str) -> None:
    """Write a resolved recipe that reads back to the same one, whatever future defaults are; atomically.

    Raises:
        ResourceError: the disk is full.
    """
    from mlm_cli import __version__

    target = Path(path)
    text = f"# Resolved by mlm {__version__}. Run it again: mlm pretrain {target.name}\n" + recipe_text(recipe)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(target)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise ResourceError(
            f"cannot write `{target}`: {error.strerror}", hint="free some space or choose another --output"
        ) from None


def recipe_text(recipe: Recipe) -> str:
    """The recipe as YAML, every key that has a value; without the sections of other verbs that nobody touched."""
    values = recipe.model_dump(mode="json", exclude_none=True)
    for section in ("generate", "retrieval", "preprocess"):
        if getattr(recipe, section) == Recipe.model_fields[section].default:
            del values[section]
    return yaml_text.dump(values)


def _base_chain(path: Path) -> list[Path]:
    """The recipe, its base, the base of that, ...: most particular first."""
    chain = [path]
    while True:
        values, lines = _read(chain[-1])
        base = values.get("base")
        if base is None:
            return chain
        where = f"{_shown(chain[-1])}:{lines.get(('base',), 1)}"
        if not isinstance(base, str):
            raise UsageError(f"{where}: `base` must be the name or file of one recipe", hint="base: gpt/355m")
        try:
            found = find_recipe(base, beside=chain[-1])
        except UsageError as error:
            raise UsageError(f"{where}: `base`: {error.message}", hint=error.hint) from None
        if any(found.samefile(seen) for seen in chain):
            names = " -> ".join(_shown(seen) for seen in [*chain, found])
            raise UsageError(f"{where}: `base` goes in a circle: {names}", hint="remove one `base:` of the circle")
        chain.append(found)


def _read(path: Path) -> tuple[dict[str, Any], yaml_text.Lines]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{_shown(path)}: not UTF-8 text (byte {error.start})", hint="a recipe is a YAML file"
        ) from None
    except OSError as error:
        raise UsageError(f"cannot read `{_shown(path)}`: {error.strerror}") from None
    values, lines = yaml_text.parse(text, source=_shown(path))
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise UsageError(
            f"{_shown(path)}: a recipe is a mapping of sections, not {type(values).__name__}",
            hint="`mlm recipe show debug/gpt` prints one",
        )
    return values, lines


def _merge_file(draft: Draft, path: Path) -> None:
    values, lines = _read(path)
    draft.merge(values, {key: f"{_shown(path)}:{line}" for key, line in lines.items()})


def _merge_override(draft: Draft, text: str) -> None:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        near = suggest(key.lstrip("-"))
        draft.mistakes.append(
            Mistake((key,), f"`{text}` is not of the form KEY=VALUE", f"for example `{near or 'train.steps'}=...`")
        )
        return
    path = tuple(key.split("."))
    if path == ("base",):
        draft.mistakes.append(Mistake(("base",), "`base` cannot be an override", "name that recipe as RECIPE instead"))
        return
    shown = f"{key}=..." if key in SECRET_KEYS else text
    draft.merge(_nested(path, yaml_text.parse_value(value)), {path: f"override `{shown}`"})


def _nested(path: Key, value: Any) -> dict[str, Any]:
    for part in reversed(path):
        value = {part: value}
    return dict(value)


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for raw, value in values.items():
        key = str(raw)
        if isinstance(value, Mapping):
            if not isinstance(into.get(key), dict):
                into[key] = {}
            _merge(into[key], value)
        elif value is None and isinstance(into.get(key), dict):
            into[key] = None if key in OPTIONAL_SECTIONS else {}
        else:
            into[key] = value


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_nulls(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }


def _absolute_paths(values: dict[str, Any]) -> None:
    """Make the paths of a draft absolute, in place."""
    for key in (*PATH_KEYS, *PATH_OR_NAME_KEYS):
        *sections, last = key.split(".")
        holder: Any = values
        for section in sections:
            holder = holder.get(section) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and last in holder:
            holder[last] = _absolute(holder[last], certain=key in PATH_KEYS)


def _absolute(value: Any, *, certain: bool) -> Any:
    if isinstance(value, list):
        return [_absolute(item, certain=certain) for item in value]
    if isinstance(value, dict) and isinstance(value.get("prefix"), str):
        return {**value, "prefix": _absolute(value["prefix"], certain=certain)}
    if not isinstance(value, str) or not value or value == "-":
        return value
    path = Path(value).expanduser()
    named = certain or path.exists() or value.startswith((".", "~"))
    return os.path.abspath(path) if named else value  # noqa: PTH100 - keeps links as the user named them


def _validate(draft: Draft) -> tuple[Recipe | None, set[str]]:
    """Judge keys and values; with mistakes, what is left of the recipe is judged too, for checks across keys.

    Returns:
        the recipe without its wrong keys, or None where that cannot be; the wrong keys and those they likely meant.
    """
    try:
        return Recipe.model_validate(draft.values), set()
    except ValidationError as error:
        found = explain(error, draft.values)
    draft.mistakes += found
    wrong = {key for mistake in found for key in mistake.keys}
    wrong |= {near for key in list(wrong) if (near := suggest(key))}
    remaining = draft.values
    for mistake in found:
        remaining = _without(remaining, tuple(mistake.keys[0].split(".")))
    try:
        return Recipe.model_validate(remaining), wrong
    except ValidationError:
        return None, wrong


def _without(values: dict[str, Any], path: Key) -> dict[str, Any]:
    """A copy without the key at ``path``; without the whole section where that cannot stand alone."""
    field_info = Recipe.model_fields.get(path[0])
    section = section_of(field_info.annotation) if field_info else None
    if len(path) == 1 or not isinstance(values.get(path[0]), dict) or (section and path[0] == "task"):
        return {key: value for key, value in values.items() if key != path[0]}
    outer = values[path[0]]
    if len(path) > 2 and isinstance(outer.get(path[1]), dict) and path[1] not in OPTIONAL_SECTIONS:
        inner = {key: value for key, value in outer[path[1]].items() if key != path[2]}
        return {**values, path[0]: {**outer, path[1]: inner}}
    return {**values, path[0]: {key: value for key, value in outer.items() if key != path[1]}}


def _shown(path: Path) -> str:
    """A path as a user would type it: relative where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)
