"""The shape of a map between our parameters and an outside layout, and careful reading of an outside config.json."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from mlm_cli.config.schema import ModelSection
from mlm_cli.errors import CheckpointError


@dataclass(frozen=True)
class Entry:
    """Where one of our parameters lies: one tensor, or one a block of the dimension that is cut in blocks."""

    sources: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True)
class KeyMap:
    """Our parameter names against those of an outside layout.

    Attributes:
        entries: our full parameter name -> where it lies outside.
        prefix: of the names of the bare model; a file may leave it out.
        zeros: outside tensors that this model has no parameter for: written as zeros, and must be zeros when read.
        absent: outside tensors that may be missing and then count as zeros.
        stand_ins: outside tensor -> others that hold the same, to be read where it is missing.
        copies: outside tensor that may be there too -> the one it must be equal to.
        ignored: outside names that carry nothing (buffers, a second copy of tied weights).
    """

    entries: dict[str, Entry]
    prefix: str
    zeros: dict[str, tuple[int, ...]] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()
    stand_ins: dict[str, tuple[str, ...]] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    ignored: re.Pattern[str] = re.compile(r"(?!)")

    def with_prefix(self, prefix: str) -> KeyMap:
        """The same map where the bare model is called otherwise."""

        def renamed(name: str) -> str:
            return prefix + name.removeprefix(self.prefix) if name.startswith(self.prefix) else name

        return replace(
            self,
            entries={
                ours: replace(entry, sources=tuple(map(renamed, entry.sources))) for ours, entry in self.entries.items()
            },
            prefix=prefix,
            zeros={renamed(name): shape for name, shape in self.zeros.items()},
            absent=frozenset(map(renamed, self.absent)),
        )


# Names of a task head's parameters (``models.heads``) -> where they lie outside, by the suffix of transformers' class.
TaskHeads = Mapping[str, Mapping[str, str]]


class ConfigReader:
    """Typed access to an outside ``config.json``; a missing or ill-typed key is a ``CheckpointError`` naming it."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is ...:
                raise CheckpointError(f"{self.where}: `{key}` is missing")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise CheckpointError(f"{self.where}: `{key}` cannot be {value!r}")
        return value

    def refuse_unless(self, key: str, allowed: Callable[[Any], bool], reason: str) -> None:
        """Refuse a model whose ``key``, where given, asks for something we would compute wrongly."""
        value = self.values.get(key)
        if value is not None and not (isinstance(value, Hashable) and allowed(value)):
            raise CheckpointError(f"{self.where}: `{key}: {value}` is not supported: {reason}")

    def section(self, **settings: Any) -> ModelSection:
        """The model section; what the outside layout has no word for comes from our own ``mlm`` entry."""
        own = self.get("mlm", dict, {})
        try:
            return ModelSection(**{**{k: v for k, v in own.items() if k in KEPT}, **settings})
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise CheckpointError(f"{self.where}: {key}: {first['msg']}, got {first['input']!r}") from None


# Keys of the model section that no outside config.json can hold; kept in its entry `mlm`.
KEPT = (
    "make_vocab_size_divisible_by", "hidden_dropout", "attention_dropout", "init_std", "attention", "binary_head",
    "decoder_seq_length",
)  # fmt: skip


def kept_settings(model: ModelSection) -> dict[str, Any]:
    keys = {*KEPT, *(("rotary_base", "rotary_scaling", "seq_length") if model.rotary_scaling is not None else ())}
    values = model.model_dump(mode="json", include=keys, exclude_none=True)
    return values | {"bias": model.bias}
