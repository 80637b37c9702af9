"""Names of Megatron-LM's classic layout against ours, and the orders in which it has kept query, key and value.

Names and orders as published in NVIDIA/Megatron-LM: ``megatron/model/language_model.py`` (what is saved, and the
renamings of ``load_state_dict``), ``megatron/model/transformer.py`` and ``megatron/checkpointing.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mlm_cli.config.schema import ModelSection
from mlm_cli.config.shapes import head_dim, num_query_groups

VERSIONS = (0.0, 1.0, 2.0, 3.0)
WORDS = "language_model.embedding.word_embeddings.weight"
HEAD_WORDS = "word_embeddings_for_head.weight"  # the last stage's copy of tied word embeddings
LAYER = "language_model.encoder.layers."
# What a state dict nests; behind one of these a name is one key, dots and all.
NESTED = (
    *(f"language_model.embedding.{kind}_embeddings" for kind in ("word", "position", "tokentype")),
    *(f"language_model.{part}" for part in ("encoder", "output_layer", "pooler")),
    "word_embeddings_for_head",
    "lm_head",
    "binary_head",
)
_RENAMED = (
    (re.compile(r"^language_model\.transformer\."), "language_model.encoder."),
    (re.compile(r"\.attention\."), ".self_attention."),
    (re.compile(r"\.(input|post_attention|final)_norm\."), r".\1_layernorm."),
    (re.compile(r"^lm_head\.norm\."), "lm_head.layernorm."),
)
IGNORED = re.compile(r".*(\._extra_state|\.inv_freq|\.masked_bias|rotary_pos_emb\..*)")


def canonical(name: str) -> str:
    """A name of any of Megatron's ages as the one that this module's tables use."""
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    return name


def old_style(name: str) -> str:
    """A canonical name as Megatron-LM wrote it up to checkpoint version 2."""
    return name.replace("language_model.encoder.", "language_model.transformer.").replace(
        ".self_attention.", ".attention."
    )


@dataclass(frozen=True)
class Family:
    """How one kind of model lies in Megatron's layout.

    Attributes:
        name: of Megatron's script that trains it.
        keys: our full parameter names -> canonical outside names.
        recognise: whether canonical names of a checkpoint are of this kind.
    """

    name: str
    keys: Callable[[ModelSection], dict[str, str]]
    recognise: Callable[[set[str]], bool]


def _gpt_keys(model: ModelSection) -> dict[str, str]:
    found = {"embedding.word.weight": WORDS}
    if model.position == "learned":
        found["embedding.position.weight"] = "language_model.embedding.position_embeddings.weight"
    norms = ("weight", "bias") if model.norm == "layernorm" else ("weight",)
    linear = ("weight", "bias") if model.bias else ("weight",)
    parts = {
        "norm1": ("input_layernorm", norms),
        "attention.qkv": ("self_attention.query_key_value", linear),
        "attention.out": ("self_attention.dense", linear),
        "norm2": ("post_attention_layernorm", norms),
        "mlp.up": ("mlp.dense_h_to_4h", linear),
        "mlp.down": ("mlp.dense_4h_to_h", linear),
    }
    for i in range(model.num_layers):
        for ours, (theirs, kinds) in parts.items():
            found |= {f"layers.{i}.{ours}.{kind}": f"{LAYER}{i}.{theirs}.{kind}" for kind in kinds}
    found |= {f"final_norm.{kind}": f"language_model.encoder.final_layernorm.{kind}" for kind in norms}
    if not model.tie_embeddings:
        found["head.weight"] = "language_model.output_layer.weight"
    return found


FAMILIES: dict[str, Family] = {
    "gpt": Family(
        "GPT",
        _gpt_keys,
        lambda names: not any(name.startswith(("lm_head.", "language_model.decoder.")) for name in names),
    ),
}


def is_qkv(name: str) -> bool:
    """Whether one of our parameters holds query, key and value rows, which Megatron orders in its own ways."""
    return ".attention.qkv." in name


@dataclass(frozen=True)
class RowOrder:
    """The order of the query, key and value rows of one rank, against ours: all queries | all keys | all values.

    ``checkpoint_version`` 0 has that order too, per rank. 1.0 has [heads, size, 3]; from 2.0 on it is
    [groups, (queries of the group, key, value), size].

    Attributes:
        heads, groups, size: of this rank: query heads, key/value heads, width of one.
    """

    version: float
    heads: int
    groups: int
    size: int

    @staticmethod
    def of(model: ModelSection, tensor: int, version: float) -> RowOrder:
        """For one of ``tensor`` ranks."""
        return RowOrder(
            version, model.num_attention_heads // tensor, num_query_groups(model) // tensor, head_dim(model)
        )

    def to_ours(self, rows: Tensor) -> Tensor:
        """``rows [(heads + 2 groups) * size, ...]`` as Megatron has them -> in our order."""
        if self.version < 1:
            return rows
        rest = rows.shape[1:]
        if self.version < 2:
            return rows.reshape(self.heads, self.size, 3, *rest).movedim(2, 0).reshape(rows.shape)
        grouped = rows.reshape(self.groups, self.heads // self.groups + 2, self.size, *rest)
        parts = grouped.split([self.heads // self.groups, 1, 1], 1)
        return torch.cat([part.reshape(-1, *rest) for part in parts])

    def to_theirs(self, rows: Tensor) -> Tensor:
        """The inverse of ``to_ours``."""
        if self.version < 1:
            return rows
        rest = rows.shape[1:]
        if self.version < 2:
            return rows.reshape(3, self.heads, self.size, *rest).movedim(0, 2).reshape(rows.shape)
        wide = [self.heads * self.size, self.groups * self.size, self.groups * self.size]
        parts = [part.reshape(self.groups, -1, self.size, *rest) for part in rows.split(wide)]
        return torch.cat(parts, 1).reshape(rows.shape)
