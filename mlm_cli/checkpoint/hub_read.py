"""Reading a model in Hugging Face layout: each rank its own slices, at any tensor size. No pickle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlm_cli.checkpoint import map_bert, map_gpt2, map_llama, map_megatron_bert, map_own, map_t5
from mlm_cli.checkpoint.key_map import ConfigReader, Entry, KeyMap
from mlm_cli.checkpoint.weight_files import WeightFiles, read_json
from mlm_cli.config.schema import ModelSection
from mlm_cli.config.shapes import check_slices
from mlm_cli.errors import CheckpointError
from mlm_cli.models.model import Model
from mlm_cli.models.registry import build_model
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.shard import full_shape, shard_of

LAYOUTS = {layout.MODEL_TYPE: layout for layout in (map_gpt2, map_llama, map_bert, map_megatron_bert, map_t5, map_own)}
# What a task head replaces: its model has no output layer over the vocabulary.
_HEADLESS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def read_model_config(folder: Path) -> tuple[ModelSection, ConfigReader]:
    """The model section of a folder's ``config.json``, and the file's own entries.

    Raises:
        CheckpointError: missing, malformed, of an unknown architecture, or asking for what we do not compute.
    """
    where = folder / "config.json"
    config = ConfigReader(read_json(where), str(where))
    kind = config.get("model_type", str, "")
    if kind not in LAYOUTS:
        named = config.values.get("architectures") or [kind or "none"]
        raise CheckpointError(
            f"{where}: unknown architecture {named[0] if isinstance(named, list) else named} (model_type `{kind}`)",
            hint=f"known model types: {', '.join(LAYOUTS)}",
        )
    config.refuse_unless("quantization_config", lambda value: False, "quantised weights")
    return LAYOUTS[kind].read_config(config), config


def load_model_folder(
    folder: str | Path,
    parallel: ParallelContext,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    head_optional: bool = False,
    changes: Mapping[str, Any] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> tuple[Model, ModelSection]:
    """Build this rank's slice of the model in ``folder``; each rank reads only the bytes it holds.

    Args:
        folder: with ``config.json`` and ``*.safetensors`` (one, or several with an index).
        parallel: any layout, whatever wrote the folder.
        dtype: of the weights in memory.
        device: unset: that of ``parallel``.
        head_optional: a folder without an output layer (a classifier's) is fine; the layer is then tied.
        changes: settings of the model section that weights do not depend on (dropout), instead of the folder's; also
            ``seq_length``: learned positions beyond those of the folder are copies of them, one after the other
            (Beltagy et al. 2020, section 5).
        on_bytes: told the bytes of each parameter filled.

    Raises:
        CheckpointError: naming the file and tensor that is missing, left over, of another shape or damaged.
        UsageError: the tensor size does not divide the model.
    """
    folder = Path(folder)
    if device is not None and torch.device(device) != parallel.device:
        raise AssertionError("the device is the context's")
    section, config = read_model_config(folder)
    num_positions = section.seq_length
    section = section.model_copy(update=dict(changes or {}))
    with WeightFiles(folder) as files:
        headless = _is_headless(config) or head_optional
        if headless and not section.tie_embeddings and "lm_head.weight" not in files:
            section = section.model_copy(update={"tie_embeddings": True})
        check_slices(section, parallel.tensor.size)
        model = build_model(section, parallel, dtype=dtype, init=False)
        layout = LAYOUTS[config.values["model_type"]].key_map(section, config)
        _fill(model, files, layout, _head_tensors(config, files), num_positions, on_bytes)
    return model, section


def _is_headless(config: ConfigReader) -> bool:
    named = config.get("architectures", list, [])
    return any(str(name).endswith(_HEADLESS) for name in named)


def _head_tensors(config: ConfigReader, files: WeightFiles) -> set[str]:
    """Tensors of a task head, which the model itself leaves to the task."""
    known = ("score.", "classifier.", "qa_outputs.")
    return {name for name in files.names() if name.startswith(known)} if _is_headless(config) else set()


def _fill(
    model: Model, files: WeightFiles, layout: KeyMap, extra: set[str], num_positions: int,
    on_bytes: Callable[[int], None] | None,
) -> None:  # fmt: skip
    """Copy this rank's slices into the parameters, and account for every tensor of the files."""
    used = set(extra)
    for name, param in model.named_parameters():
        if name == "embedding.position.weight" and param.shape[0] != num_positions:
            stored = param.new_empty(num_positions, param.shape[1])
            _read_parameter(stored, layout.entries[name], files, layout, model.parallel, used)
            param.data.copy_(stored[torch.arange(param.shape[0], device=stored.device) % num_positions])
            continue
        _read_parameter(param, layout.entries[name], files, layout, model.parallel, used)
        if on_bytes is not None:
            on_bytes(param.numel() * param.element_size())
    if model.parallel.pipeline.size > 1:  # what other stages read is known too
        sources = [source for entry in layout.entries.values() for source in entry.sources]
        used.update(found for source in sources if (found := _find(source, files, layout)) is not None)
    for name, shape in layout.zeros.items():
        found = _find(name, files, layout)
        if found is not None:
            files.check_shape(found, shape)
            if files.read(found).any():
                raise CheckpointError(f"{files.file_of(found)}: tensor {name} is not zero, though config.json says so")
            used.add(found)
    for name, original in layout.copies.items():
        if name in files and name not in used:
            first = _find(original, files, layout)
            if first is None or not files.read(name).equal(files.read(first)):
                raise CheckpointError(
                    f"{files.file_of(name)}: tensor {name} is not {original}, though config.json says that it is",
                    hint="for an output layer of its own config.json has `tie_word_embeddings: false`",
                )
            used.add(name)
    for name in files.names():
        if name not in used and not layout.ignored.fullmatch(name):
            raise CheckpointError(
                f"{files.file_of(name)}: unexpected tensor {name}", hint="config.json does not describe this model"
            )


def _find(name: str, files: WeightFiles, layout: KeyMap) -> str | None:
    """The name under which the files hold a tensor: with or without the prefix of the bare model, or a stand-in's."""
    for candidate in (name, name.removeprefix(layout.prefix), *layout.stand_ins.get(name, ())):
        if candidate in files:
            return candidate
    return None


@torch.no_grad()
def _read_parameter(
    param: Tensor, entry: Entry, files: WeightFiles, layout: KeyMap, parallel: ParallelContext, used: set[str]
) -> None:
    """Fill one parameter, range by range, from the one or more tensors it is made of."""
    rank, size, shard = parallel.tensor.rank, parallel.tensor.size, shard_of(param)
    shape = list(full_shape(param, size))
    dim = shard.dim if shard is not None else 0
    ranges = shard.ranges(shape[dim], rank, size) if shard is not None else [(0, shape[0])]
    valid = shard.valid if shard is not None and shard.valid is not None else shape[dim]
    widths = list(shard.blocks) if shard is not None and shard.blocks and len(entry.sources) > 1 else [valid]
    assert len(widths) == len(entry.sources)

    begins = [sum(widths[:i]) for i in range(len(widths))]
    for source, width in zip(entry.sources, widths, strict=True):
        found = _find(source, files, layout)
        if found is None and source in layout.absent:
            continue
        outside = [*shape[:dim], width, *shape[dim + 1 :]]
        files.check_shape(found or source, tuple(reversed(outside)) if entry.transposed else tuple(outside))
        assert found is not None
        used.add(found)
    param.zero_()
    offset = 0
    for start, stop in ranges:
        source = max(i for i, begin in enumerate(begins) if begin <= start)
        found = _find(entry.sources[source], files, layout)
        first, last = start - begins[source], min(stop, valid if len(begins) == 1 else stop) - begins[source]
        if found is not None and last > first:
            whole = last - first == widths[source]
            outside_dim = 1 - dim if entry.transposed else dim
            values = files.read(found) if whole else files.read(found, outside_dim, first, last)
            param.narrow(dim, offset, last - first).copy_(values.t() if entry.transposed else values)
        offset += stop - start
