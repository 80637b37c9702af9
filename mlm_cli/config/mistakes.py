"""A mistake in a recipe, and how several of them are told at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mlm_cli.errors import UsageError

SCHEMA_HINT = "`mlm recipe schema` lists every key with its default"


@dataclass(frozen=True)
class Mistake:
    """One thing wrong with a recipe.

    Attributes:
        keys: dotted recipe keys it is about, the one to look at first in front.
        message: what is wrong, naming the key.
        hint: the way out.
        where: ``file:line`` or the override it came from; filled in by whoever knows.
    """

    keys: tuple[str, ...]
    message: str
    hint: str | None = None
    where: str | None = None

    @property
    def located(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


def as_error(mistakes: Iterable[Mistake]) -> UsageError:
    """One exception that tells every mistake."""
    found = list(dict.fromkeys(mistakes))
    if len(found) == 1:
        return UsageError(found[0].located, hint=found[0].hint or SCHEMA_HINT)
    lines = [f"{len(found)} mistakes in the recipe"]
    for mistake in found:
        lines.append(f"  {mistake.located}")
        if mistake.hint:
            lines.append(f"    -> {mistake.hint}")
    return UsageError("\n".join(lines), hint=SCHEMA_HINT)
