"""Validation errors in a recipe user's words."""

from __future__ import annotations

import difflib
from collections import defaultdict
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mlm_cli.config.keys import SECRET_KEYS, section_of, suggest
from mlm_cli.config.mistakes import Mistake
from mlm_cli.config.schema import Recipe

_KINDS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "model_type": "a section of keys",
    "dict_type": "a section of keys",
}


def explain(error: ValidationError, values: dict[str, Any]) -> list[Mistake]:
    """One mistake for each wrong key; ``values`` is what was validated."""
    by_key: dict[str, list[ErrorDetails]] = defaultdict(list)
    for detail in error.errors(include_url=False):
        by_key[_dotted(detail["loc"])].append(detail)
    return [_mistake(key, details, values) for key, details in by_key.items()]


def _dotted(loc: tuple[int | str, ...]) -> str:
    """The recipe key of an error, without the branches of unions that pydantic appends."""
    parts = [str(loc[0])]
    field = Recipe.model_fields.get(parts[0])
    section = section_of(field.annotation) if field else None
    for part in loc[1:]:
        if section is None:
            break
        parts.append(str(part))
        inner = section.model_fields.get(str(part))
        section = section_of(inner.annotation) if inner else None
    return ".".join(parts)


def _mistake(key: str, details: list[ErrorDetails], values: dict[str, Any]) -> Mistake:
    # Of a union's branches, the one that went furthest into the value is the one that was meant.
    detail = max(details, key=lambda item: len(item["loc"]))
    kind = detail["type"]
    own = len(detail["loc"]) <= key.count(".") + 1  # else it is about something inside the key's value
    if kind == "extra_forbidden" and own:
        near = suggest(key)
        hint = f"did you mean `{near}`?" if near else "`mlm recipe schema` lists every key"
        return Mistake((key,), f"`{key}` is not a recipe key", hint)
    if kind == "missing" and own:
        return Mistake((key,), f"`{key}` is missing", f"add `{key}=...` or the line to the recipe")
    inner = "".join(f"[{part}]" if isinstance(part, int) else "" for part in detail["loc"])
    got = "something else (not shown)" if key in SECRET_KEYS else _short(detail["input"])
    if kind == "literal_error":
        return Mistake((key,), f"`{key}` must be one of {detail['ctx']['expected']}; it is {got}", _choice_hint(detail))
    if kind == "extra_forbidden":
        return Mistake((key,), f"`{key}{inner}` has an unknown key `{detail['loc'][-1]}`", None)
    if kind == "missing":
        return Mistake((key,), f"`{key}{inner}` lacks `{detail['loc'][-1]}`", None)
    if len(details) > 1 and len({len(item["loc"]) for item in details}) == 1:
        wanted = " or ".join(dict.fromkeys(_KINDS.get(item["type"], _rule(item)) for item in details))
        return Mistake((key,), f"`{key}` must be {wanted}; it is {got}", None)
    wanted = _KINDS.get(kind, _rule(detail))
    return Mistake((key,), f"`{key}{inner}` must be {wanted}; it is {got}", None)


def _rule(detail: ErrorDetails) -> str:
    return detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")


def _choice_hint(detail: ErrorDetails) -> str | None:
    choices = [choice.strip(" '") for choice in detail["ctx"]["expected"].replace(" or ", ",").split(",")]
    close = difflib.get_close_matches(str(detail["input"]), choices, n=1, cutoff=0.5)
    return f"did you mean `{close[0]}`?" if close else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
