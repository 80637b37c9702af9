"""Reading a model in Hugging Face layout: each rank its own slices, at any tensor size. No pickle."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlm_cli.checkpoint import compressed_tensors, map_bert, map_gpt2, map_llama, map_megatron_bert, map_own, map_t5
from mlm_cli.checkpoint.key_map import ConfigReader, Entry, KeyMap
from mlm_cli.checkpoint.weight_files import WeightFiles, read_json
from mlm_cli.config.schema import ModelSection
from mlm_cli.config.shapes import check_slices, crossed_ramp, head_dim, num_decoder_layers
from mlm_cli.errors import CheckpointError
from mlm_cli.models.model import Model
from mlm_cli.models.registry import build_model
from mlm_cli.ops.int8 import dequantize_rows
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.layers import ParallelLinear
from mlm_cli.parallel.shard import full_shape, shard_of

LAYOUTS = {layout.MODEL_TYPE: layout for layout in (map_gpt2, map_llama, map_bert, map_megatron_bert, map_t5, map_own)}
TASK = "mlm_task"  # entry of a config.json: the task that we fine-tuned it to, and its settings
# transformers' classes with a task's head in place of the output layer over the vocabulary, by the end of their names.
TASK_CLASSES = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")


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
    compressed_tensors.is_quantized(config)  # refuses other kinds
    section: ModelSection = LAYOUTS[kind].read_config(config)
    if head_dim(section) < 1:
        heads, width = section.num_attention_heads, section.hidden_size
        raise CheckpointError(f"{where}: {heads} attention heads do not fit into a width of {width}")
    if section.rotary_scaling is not None and (crossed := crossed_ramp(section.rotary_scaling)) is not None:
        raise CheckpointError(f"{where}: `{crossed[0]}` of the rotary positions is not above `{crossed[1]}`")
    return section, config


def load_model_folder(
    folder: str | Path,
    parallel: ParallelContext,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    head: bool = True,
    changes: Mapping[str, Any] | None = None,
    keep_int8: bool = False,
    on_bytes: Callable[[int], None] | None = None,
) -> tuple[Model, ModelSection]:
    """Build this rank's slice of the model in ``folder``; each rank reads only the bytes it holds.

    Args:
        folder: with ``config.json`` and ``*.safetensors`` (one, or several with an index).
        parallel: any layout, whatever wrote the folder.
        dtype: of the weights in memory.
        device: unset: that of ``parallel``.
        head: False leaves out the head of pretraining, and passes over it, or over that of a task, in the files.
        changes: settings of the model section that weights do not depend on (dropout), instead of the folder's; also
            ``seq_length``: learned positions beyond those of the folder are copies of them, one after the other
            (Beltagy et al. 2020, section 5).
        keep_int8: hold matrices that are int8 in the files as they are there (``ParallelLinear.hold_int8``), for
            inference; unset: as the floating point that they stand for.
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
        if head and task_class(config) is not None:
            raise CheckpointError(
                f"{folder} holds a {config.values['architectures'][0]}, which has no output layer over the vocabulary",
                hint="name the model that it was fine-tuned from",
            )
        check_slices(section, parallel.tensor.size)
        num_layers = section.num_layers + (num_decoder_layers(section) if section.family == "t5" else 0)
        if num_layers > len(files.names()):
            raise CheckpointError(
                f"{folder / 'config.json'} asks for {num_layers} layers, {files.file_of('')} holds "
                f"{len(files.names())} tensors"
            )
        layout = key_map_of(section, config)
        # Before any memory is taken: a config.json of another model may ask for a hundred times more than there is.
        try:
            meta = replace(parallel, device=torch.device("meta"))
            shapes = build_model(section, meta, dtype=dtype, init=False, head=head)
        except RuntimeError as error:  # a size beyond what 64 bits count
            raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
        quantized = compressed_tensors.is_quantized(config)
        _check(shapes, files, layout, num_positions, quantized)
        model = build_model(section, parallel, dtype=dtype, init=False, head=head)
        if quantized and keep_int8:
            _hold_int8(model, files, layout)
        _fill(model, files, layout, set() if head else head_tensors(config, files), num_positions, on_bytes)
    return model, section


def task_class(config: ConfigReader) -> str | None:
    """The end of the class name (``ForSequenceClassification``) where ``config.json`` names one with a task's head."""
    for name in config.get("architectures", list, []):
        for ending in TASK_CLASSES:
            if str(name).endswith(ending):
                return ending
    return None


def trained_task(config: ConfigReader) -> str | None:
    """The kind of task (``config.tasks``) that we fine-tuned the model to; None: none."""
    name = config.get(TASK, dict, {}).get("name")
    return None if name is None else str(name)


def key_map_of(section: ModelSection, config: ConfigReader) -> KeyMap:
    """Where the model's parameters lie in a folder with this ``config.json``."""
    layout = LAYOUTS[config.values["model_type"]]
    found: KeyMap = layout.key_map(section, config)
    prefix = getattr(layout, "TASK_PREFIX", {}).get(task_class(config))
    return found.with_prefix(prefix) if prefix else found


def head_tensors(config: ConfigReader, files: WeightFiles) -> set[str]:
    """Tensors of heads, of pretraining or of a task, in a folder with this ``config.json``: all that a model without
    its head leaves alone."""
    heads: re.Pattern[str] = LAYOUTS[config.values["model_type"]].HEADS
    return {name for name in files.names() if heads.fullmatch(name)}


def _check(model: Model, files: WeightFiles, layout: KeyMap, num_positions: int, quantized: bool) -> None:
    """Refuse files that lack a tensor for one of the parameters of this rank, or hold it in another shape."""
    for name, param in model.named_parameters():
        if name == "embedding.position.weight":
            param = param.new_empty(num_positions, param.shape[1])
        _check_parameter(param, layout.entries[name], files, layout, model.parallel.tensor.size, quantized)


def _hold_int8(model: Model, files: WeightFiles, layout: KeyMap) -> None:
    """Make room for int8 in the layers whose matrices are int8 in the files, all parts of them."""
    for prefix, module in model.named_modules():
        if isinstance(module, ParallelLinear):
            found = [find(source, files, layout) for source in layout.entries[f"{prefix}.weight"].sources]
            held = [name for name in found if name is not None and files.is_int8(name)]
            if len(held) == len(found):
                module.hold_int8(compressed_tensors.scale_dtype(files, held))


def _fill(
    model: Model, files: WeightFiles, layout: KeyMap, extra: set[str], num_positions: int,
    on_bytes: Callable[[int], None] | None,
) -> None:  # fmt: skip
    """Copy this rank's slices into the parameters, and account for every tensor of the files."""
    used = set(extra)
    scales = {f"{name.removesuffix('weight_scale')}weight": scale for name, scale in model.named_buffers()}
    for name, param in model.named_parameters():
        if name == "embedding.position.weight" and param.shape[0] != num_positions:
            stored = param.new_empty(num_positions, param.shape[1])
            _read_parameter(stored, layout.entries[name], files, layout, model.parallel, used)
            param.data.copy_(stored[torch.arange(param.shape[0], device=stored.device) % num_positions])
            continue
        _read_parameter(param, layout.entries[name], files, layout, model.parallel, used, scales.get(name))
        if on_bytes is not None:
            on_bytes(param.numel() * param.element_size())
    if model.parallel.pipeline.size > 1:  # what other stages read is known too
        sources = [source for entry in layout.entries.values() for source in entry.sources]
        used.update(_found(sources, files, layout))
    for name, shape in layout.zeros.items():
        found = find(name, files, layout)
        if found is not None:
            files.check_shape(found, shape)
            if files.read(found).any():
                raise CheckpointError(f"{files.file_of(found)}: tensor {name} is not zero, though config.json says so")
            used.add(found)
    for name, original in layout.copies.items():
        if name in files and name not in used:
            first = find(original, files, layout)
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


def find(name: str, files: WeightFiles, layout: KeyMap) -> str | None:
    """The name under which the files hold a tensor: with or without the prefix of the bare model, or a stand-in's."""
    for candidate in (name, name.removeprefix(layout.prefix), *layout.stand_ins.get(name, ())):
        if candidate in files:
            return candidate
    return None


def _found(sources: Iterable[str], files: WeightFiles, layout: KeyMap) -> Iterator[str]:
    """Names under which the files hold some tensors, and their scales."""
    for source in sources:
        name = find(source, files, layout)
        if name is not None:
            yield name
            if files.is_int8(name):
                yield compressed_tensors.scale_name(name)


def _widths(param: Tensor, entry: Entry, size: int) -> tuple[list[int], int, list[int]]:
    """Of the whole parameter: its shape, the dimension that is cut, and how wide each of its sources is there."""
    shard, shape = shard_of(param), list(full_shape(param, size))
    dim = shard.dim if shard is not None else 0
    valid = shard.valid if shard is not None and shard.valid is not None else shape[dim]
    widths = list(shard.blocks) if shard is not None and shard.blocks and len(entry.sources) > 1 else [valid]
    assert len(widths) == len(entry.sources)
    return shape, dim, widths


def _check_parameter(
    param: Tensor, entry: Entry, files: WeightFiles, layout: KeyMap, size: int, quantized: bool
) -> None:
    shape, dim, widths = _widths(param, entry, size)
    for source, width in zip(entry.sources, widths, strict=True):
        found = find(source, files, layout)
        if found is None and source in layout.absent:
            continue
        outside = [*shape[:dim], width, *shape[dim + 1 :]]
        if quantized and len(outside) == 2 and not entry.transposed:
            compressed_tensors.check_matrix(files, found or source, tuple(outside))
        else:
            files.check_shape(found or source, tuple(reversed(outside)) if entry.transposed else tuple(outside))


@torch.no_grad()
def _read_parameter(
    param: Tensor, entry: Entry, files: WeightFiles, layout: KeyMap, parallel: ParallelContext, used: set[str],
    scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill one parameter, and its ``scale`` where it is held as int8, range by range, from the one or more tensors it
    is made of."""
    rank, size, shard = parallel.tensor.rank, parallel.tensor.size, shard_of(param)
    shape, dim, widths = _widths(param, entry, size)
    ranges = shard.ranges(shape[dim], rank, size) if shard is not None else [(0, shape[0])]
    begins = [sum(widths[:i]) for i in range(len(widths))]
    used.update(_found(entry.sources, files, layout))
    param.zero_()
    offset = 0
    for start, stop in ranges:
        source = max(i for i, begin in enumerate(begins) if begin <= start)
        found = find(entry.sources[source], files, layout)
        first, last = start - begins[source], min(stop, sum(widths)) - begins[source]
        if found is not None and last > first:
            whole = last - first == widths[source]
            outside_dim = 1 - dim if entry.transposed else dim
            values = files.read(found) if whole else files.read(found, outside_dim, first, last)
            if files.is_int8(found):  # its scales belong to its rows, of which a slice of columns has all
                rows = compressed_tensors.read_scales(files, found, *((first, last) if dim == 0 else ()))
                if scale is None:
                    values = dequantize_rows(values, rows, param.dtype)
                else:
                    (scale.narrow(0, offset, last - first) if dim == 0 else scale).copy_(rows)
            param.narrow(dim, offset, last - first).copy_(values.t() if entry.transposed else values)
        offset += stop - start
