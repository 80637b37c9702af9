"""Checks of the keys of a watermark against each other."""

from __future__ import annotations

from collections.abc import Iterator

from mlm_cli.config.mistakes import Mistake
from mlm_cli.config.schema import Recipe

_MAKE_A_KEY = (
    "keep a random whole number in a file of your own (`python -c 'import secrets; print(secrets.randbits(31) | 1)' "
    "> ~/watermark-key`) and name it: generate.watermark_key=file:~/watermark-key"
)


def check_watermark(recipe: Recipe, verb: str) -> Iterator[Mistake]:
    """What keeps ``verb`` (``generate`` or ``evaluate``) from writing, or looking for, a watermark."""
    keys = recipe.generate
    wanted = keys.watermark_bias > 0 if verb == "generate" else "watermark" in recipe.evaluate.tasks
    if wanted and keys.watermark_key is None:
        yield Mistake(
            ("generate.watermark_key", "generate.watermark_bias"),
            "a watermark has a secret key, and `generate.watermark_key` does not say where it is",
            _MAKE_A_KEY,
        )
    if keys.watermark_scheme == "lefthash" and keys.watermark_context not in (None, 1):
        yield Mistake(
            ("generate.watermark_context", "generate.watermark_scheme"),
            f"`generate.watermark_context` {keys.watermark_context}: lefthash looks at one token, the last",
            "leave it out, or use `generate.watermark_scheme=selfhash`",
        )
