"""What makes a run the run it is: which recipe keys may change when it goes on, and which make it another one."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from mlm_cli.config.schema import Recipe
from mlm_cli.config.shapes import is_sparse
from mlm_cli.errors import UsageError

# Changing these changes what was learned so far, or which samples come next.
_FIXED_SECTIONS = ("model", "task")
_FIXED_KEYS = ("seed", "init_from", "train.global_batch_size", "train.rampup")
# Paths may move: data and tokenizer are held to the fingerprint in the manifest instead.
_SAID_SECTIONS = ("optimizer", "schedule")
_SAID_KEYS = ("train.steps", "train.precision", "train.clip_grad")


def fixed_values(recipe: Recipe) -> dict[str, Any]:
    """Dotted keys that a run keeps for life. Sizes that follow from other things must already be filled in."""
    without = ("model.attention", "task.train", "task.dev", *(("train.rampup",) if recipe.train.rampup is None else ()))
    picked = _pick(recipe, _FIXED_SECTIONS, _FIXED_KEYS, without=without)
    if is_sparse(recipe.model):  # what a query sees is of the model; which kernel computes it is not
        attention = recipe.model.attention.model_dump(mode="json", exclude={"kernel"})
        picked |= {f"model.attention.{key}": value for key, value in attention.items()}
    return picked


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 of the values that a run keeps for life."""
    return hashlib.sha256(json.dumps(fixed_values(recipe), sort_keys=True).encode()).hexdigest()


def check_same_run(old: Recipe, new: Recipe, folder: str) -> list[str]:
    """Refuse to go on with another model; returns the allowed changes worth saying, as ``key: old -> new``.

    Raises:
        UsageError: a key that a run keeps for life differs.
    """
    changed = _changes(fixed_values(old), fixed_values(new))
    if changed:
        raise UsageError(
            f"{folder} holds a run of another recipe:\n  " + "\n  ".join(changed),
            hint="choose another folder with --output, or give the run's own recipe.yaml to continue it",
        )
    return _changes(_pick(old, _SAID_SECTIONS, _SAID_KEYS), _pick(new, _SAID_SECTIONS, _SAID_KEYS))


def _pick(
    recipe: Recipe, sections: tuple[str, ...], keys: tuple[str, ...], without: tuple[str, ...] = ()
) -> dict[str, Any]:
    values = recipe.model_dump(mode="json")
    picked: dict[str, Any] = {}
    for section in sections:
        inner = values.get(section)
        picked |= {f"{section}.{key}": value for key, value in inner.items()} if inner else {section: None}
    for key in keys:
        section, _, last = key.rpartition(".")
        picked[key] = (values[section] if section else values)[last]
    return {key: value for key, value in picked.items() if key not in without}


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
