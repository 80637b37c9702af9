"""Which matrices of a model are written as int8, and how: those of attention and feed-forward layers.

Embeddings, output layers, heads, norms and biases keep their type: quality depends on them most, and of a large model
they are a small part.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mlm_cli.checkpoint import compressed_tensors, map_own
from mlm_cli.checkpoint.key_map import Entry, KeyMap
from mlm_cli.checkpoint.weight_shares import Job
from mlm_cli.config.schema import ModelSection
from mlm_cli.config.shapes import hub_layout
from mlm_cli.errors import CheckpointError, UsageError
from mlm_cli.models.model import Model
from mlm_cli.models.registry import build_model
from mlm_cli.ops.int8 import quantize_rows
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.layers import ParallelLinear
from mlm_cli.parallel.shard import full_shape, gather_full, shard_of


@dataclass(frozen=True)
class Int8Layers:
    """The int8 part of a model that is written.

    Attributes:
        model: whose layers they are.
        modules: name of a matrix -> its layer.
        layout: ``model_type`` of the folder: transformers' where it has linear layers for these matrices, else our own,
            which transformers refuses to open. (It would take int8 for the weights of a GPT-2 themselves.)
    """

    model: Model
    modules: dict[str, ParallelLinear]
    layout: str

    @staticmethod
    def of(model: Model, *, wanted: bool) -> Int8Layers | None:
        """The matrices to be int8: all of the layers where ``wanted``, else those held so; None: there are none.

        Raises:
            UsageError: a mixture of experts, of which nothing is known as int8.
        """
        modules = {
            f"{name}.weight": module
            for name, module in model.named_modules()
            if isinstance(module, ParallelLinear) and (wanted or module.weight_scale is not None)
        }
        return Int8Layers(model, modules, Int8Layers.layout_of(model.config)) if wanted or modules else None

    @staticmethod
    def layout_of(model: ModelSection) -> str:
        """``layout`` of a model section.

        Raises:
            UsageError: a mixture of experts.
        """
        if model.experts is not None:
            raise UsageError(
                f"the weights of a mixture of experts (model.experts: {model.experts}) are not made int8",
                hint="use `--dtype bf16`",
            )
        layout = hub_layout(model)
        return map_own.MODEL_TYPE if layout == "gpt2" else layout

    def __contains__(self, name: str) -> bool:
        return name in self.modules

    def job(self, name: str, local: Tensor, entry: Entry, dtype: torch.dtype) -> Job:
        """The int8 and the scales of a matrix, for the one or more tensors that it becomes.

        Args:
            local: this rank's slice of its weights.
            dtype: of new scales.
        """
        scale = self.modules[name].weight_scale
        shard, tensor = shard_of(self.modules[name].weight), self.model.parallel.tensor
        rows, columns = full_shape(self.modules[name].weight, tensor.size)
        several = shard is not None and shard.blocks is not None and len(entry.sources) > 1
        heights = list(shard.blocks) if several else [rows]  # type: ignore[union-attr]
        kind = dtype if scale is None else scale.dtype
        sizes: dict[str, int] = {}
        for source, height in zip(entry.sources, heights, strict=True):
            sizes |= {source: height * columns, compressed_tensors.scale_name(source): height * kind.itemsize}

        def make() -> dict[str, Tensor]:
            full = gather_full(local.detach().view_as(self.modules[name].weight), shard, tensor)
            if scale is None:
                codes, scales = _quantized(full, kind, name)
            else:
                assert tensor.size == 1, "int8 that a model holds is written again by one rank"
                codes, scales = full, scale
            found: dict[str, Tensor] = {}
            parts = zip(entry.sources, codes.cpu().split(heights), scales.cpu().split(heights), strict=True)
            for source, part, of_rows in parts:
                found |= {source: part, compressed_tensors.scale_name(source): of_rows[:, None]}
            return {key: value.contiguous() for key, value in found.items()}

        return Job(sizes, make)

    def config_entry(self, key_map: KeyMap, layout: ModuleType) -> dict[str, Any]:
        """What ``config.json`` says of it, with every linear layer of the layout that is not int8 by name."""
        heads: dict[str, dict[str, str]] = getattr(layout, "TASK_HEADS", {})
        plain = {
            source for name, entry in key_map.entries.items() if name.startswith("head.") for source in entry.sources
        }
        plain |= {*key_map.copies, *(theirs for names in heads.values() for theirs in names.values())}
        held = [name.removesuffix(".weight") for name in plain if name.endswith(".weight")]
        whole = {name for name in self._matrices() if name not in self.modules}
        held += [source.removesuffix(".weight") for name in whole for source in key_map.entries[name].sources]
        # The bare model's names begin otherwise where transformers puts another head on it.
        prefix = key_map.prefix
        ignore = {f"re:.*{re.escape(n.removeprefix(prefix))}$" if prefix and n.startswith(prefix) else n for n in held}
        return {compressed_tensors.KEY: compressed_tensors.entry(ignore)}

    def _matrices(self) -> list[str]:
        return [f"{name}.weight" for name, module in self.model.named_modules() if isinstance(module, ParallelLinear)]


def count_int8(model: ModelSection) -> int:
    """Weights of a model that ``mlm convert --dtype int8`` makes int8."""
    built = build_model(model, ParallelContext(device=torch.device("meta")), init=False)
    return sum(module.weight.numel() for module in built.modules() if isinstance(module, ParallelLinear))


def _quantized(matrix: Tensor, dtype: torch.dtype, name: str) -> tuple[Tensor, Tensor]:
    try:
        return quantize_rows(matrix, dtype)
    except ValueError as error:
        raise CheckpointError(f"parameter {name} cannot be made int8: {error}") from None
