"""Writing a model in Hugging Face layout from the slices of its ranks, a few tensors at a time. No pickle."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mlm_cli.checkpoint import compressed_tensors, map_own
from mlm_cli.checkpoint.hub_read import LAYOUTS
from mlm_cli.checkpoint.int8_layers import Int8Layers
from mlm_cli.checkpoint.key_map import Entry, KeyMap, kept_settings
from mlm_cli.checkpoint.manifest import FileRecord
from mlm_cli.checkpoint.model_card import model_card
from mlm_cli.checkpoint.tensor_file import write_tensors
from mlm_cli.checkpoint.weight_files import INDEX
from mlm_cli.checkpoint.weight_shares import Job, Shares, share_out
from mlm_cli.config.schema import ModelSection
from mlm_cli.config.shapes import hub_layout, is_sparse
from mlm_cli.data.tokenizer import Tokenizer
from mlm_cli.errors import CheckpointError, UsageError
from mlm_cli.models.model import Model
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.shard import full_shape, gather_full, shard_of

_PRETRAINING = re.compile("LMHeadModel$|For(CausalLM|MaskedLM|PreTraining|ConditionalGeneration)$")
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class Head:
    """A task head to be written with a model that has none of its own.

    Attributes:
        architecture: end of the name of transformers' class (``ForSequenceClassification``; ``Model``: no head at all).
        tensors: outside names -> tensors, whole on every rank.
        config: entries for ``config.json`` (``id2label``, ``num_labels``, ``pad_token_id``).
    """

    architecture: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]


def save_model_folder(
    model: Model,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    meta: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    int8: bool = False,
    head: Head | None = None,
    config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 4 << 30,
    later: list[Callable[[], None]] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> dict[str, FileRecord]:
    """Write ``model`` in Hugging Face layout. All ranks call; those of tensor and pipeline groups share the writing.

    A layer at a time is gathered, so no rank ever holds the whole model twice. Data-parallel copies hold the same: only
    data rank 0 does anything.

    Args:
        folder: made if needed.
        tokenizer: its files travel with the model.
        meta: facts for the model card (``data``, ``steps``, ``tokens``, ``loss``, ...).
        weights: slices to write instead of the model's own, by full parameter name (float32 masters).
        dtype: of the files; unset: that of the weights.
        int8: the matrices of the layers become int8 with scales (``int8_layers``); those that the model holds so
            already stay as they are in any case.
        head: of a task, where the model was built without one of its own.
        config: further entries for ``config.json``.
        max_shard_bytes: files grow no larger; more than one get an index.
        later: nothing is written now: a copy of the weights is taken, and what is left to do with it is added to this
            list, to be called in order, in any thread (no collectives are left).
        on_bytes: told the bytes of each weight file, on the rank that writes it, when it is written.

    Returns:
        size and SHA-256 of each weight file that this rank writes (with ``later``: once that is done).

    Raises:
        CheckpointError: the tokenizer has more tokens than the model.
        UsageError: no Hugging Face architecture holds this model.
        OSError: from the file system (a full disk), on the writing rank, after all ranks have done their part.
    """
    if tokenizer is not None:
        check_vocabulary(model.config, tokenizer)
    assert head is None or model.head is None, "a task's head stands in place of the model's own"
    layers = Int8Layers.of(model, wanted=int8)
    layout = LAYOUTS[layers.layout if layers is not None else hub_layout(model.config)]
    if model.parallel.replicas.rank != 0:
        return {}
    tensor, pipeline = model.parallel.tensor, model.parallel.pipeline
    writer = _Writer(Path(folder), later, on_bytes)
    key_map: KeyMap = layout.key_map(model.config)
    prefix = getattr(layout, "TASK_PREFIX", {}).get(head.architecture if head is not None else None)
    if prefix:
        key_map = key_map.with_prefix(prefix)
    jobs = _jobs(model, key_map, weights, dtype, head, layers)
    live = [*model.parameters(), *(weights or {}).values(), *(head.tensors.values() if head else ())]
    shares = share_out(jobs, tensor, pipeline, max_shard_bytes)
    for file in shares.files:
        tensors: dict[str, Tensor] = {}
        for job in file.jobs:
            made = job.make()
            tensors |= made if file.mine else {}
        if file.mine:
            writer.weights(file.name, _own_copies(tensors, live) if later is not None else tensors)
    if tensor.rank == 0 and pipeline.rank == 0:
        out_dtype = dtype or _dtype_of(model, weights)
        writer.add(lambda: _write_index(Path(folder), shares))
        further = {**(layers.config_entry(key_map, layout) if layers is not None else {}), **(config or {})}
        writer.add(lambda: _write_texts(Path(folder), model, layout, tokenizer, meta or {}, out_dtype, head, further))
    writer.finish()
    return writer.records


def check_vocabulary(model: ModelSection, tokenizer: Tokenizer, where: str = "the model") -> None:
    """Refuse a tokenizer that can give ids the model has no rows for."""
    if model.vocab_size is not None and tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"{where} has {model.vocab_size} tokens, its tokenizer `{tokenizer.name}` {tokenizer.vocab_size}",
            hint="use the tokenizer the model was trained with",
        )


def refuse_inexpressible(model: ModelSection, *, int8: bool = False) -> None:
    """Raise unless transformers, given the folder alone, computes what we do.

    Raises:
        UsageError: naming what it has no architecture for.
    """
    if int8 and Int8Layers.layout_of(model) != hub_layout(model):
        raise UsageError(
            "transformers reads int8 for linear layers only, and a GPT-2 has none (its Conv1D modules are transposed)",
            hint="`--to mlm` keeps int8 weights, for `mlm` alone; `--to hf --dtype bf16` is for transformers",
        )
    if hub_layout(model) == map_own.MODEL_TYPE:
        raise UsageError(
            f"no architecture of transformers holds this model: a mixture of experts (model.experts: {model.experts})",
            hint="`--to mlm` keeps it",
        )
    if is_sparse(model):
        raise UsageError(
            f"no architecture of transformers holds this model: sparse attention (model.attention.pattern: "
            f"{model.attention.pattern}); transformers would attend to every token, which is another model",
            hint="`--to mlm` keeps it",
        )


def _jobs(
    model: Model, key_map: KeyMap, weights: Mapping[str, Tensor] | None, dtype: torch.dtype | None, head: Head | None,
    layers: Int8Layers | None,
) -> list[Job]:  # fmt: skip
    jobs = []
    for name, param in model.named_parameters():
        if name in model.copies:
            continue  # its owner, an earlier stage, writes it
        local = weights[name] if weights is not None else param.detach()
        kind = dtype or local.dtype
        entry = key_map.entries[name]
        if layers is not None and name in layers:
            jobs.append(layers.job(name, local, entry, dtype or _dtype_of(model, weights)))
            continue
        sizes = _sizes(param, entry, kind, model.parallel.tensor.size)
        jobs.append(Job(sizes, _maker(local, param, entry, kind, model.parallel)))
    default = dtype or _dtype_of(model, weights)
    zeros = {name: torch.zeros(shape, dtype=default) for name, shape in key_map.zeros.items()}
    extra = {name: tensor.detach().to(default) for name, tensor in head.tensors.items()} if head else {}
    for name, tensor in (zeros | extra).items() if model.has_embedding else ():
        jobs.append(Job({name: tensor.numel() * tensor.element_size()}, lambda pair=(name, tensor): dict([pair])))
    return jobs


def _sizes(param: Tensor, entry: Entry, dtype: torch.dtype, tensor_size: int) -> dict[str, int]:
    """Bytes of the tensors that a parameter becomes, without padding."""
    shard, shape = shard_of(param), list(full_shape(param, tensor_size))
    if shard is not None and shard.valid is not None:
        shape[shard.dim] = shard.valid
    if len(entry.sources) == 1:
        return {entry.sources[0]: math.prod(shape) * dtype.itemsize}
    assert shard is not None and shard.blocks is not None
    row = math.prod(shape) // shape[shard.dim] * dtype.itemsize
    return {source: block * row for source, block in zip(entry.sources, shard.blocks, strict=True)}


def _dtype_of(model: Model, weights: Mapping[str, Tensor] | None) -> torch.dtype:
    """What the weights are now: an engine may have put float32 masters in the place of a bfloat16 model's."""
    return next(iter(weights.values() if weights else model.parameters())).dtype


def _maker(
    local: Tensor, param: Tensor, entry: Entry, dtype: torch.dtype, parallel: ParallelContext
) -> Callable[[], dict[str, Tensor]]:
    def make() -> dict[str, Tensor]:
        shard = shard_of(param)
        full = gather_full(local.detach().view_as(param).to(dtype), shard, parallel.tensor).cpu()
        if shard is not None and shard.valid is not None:
            full = full.narrow(shard.dim, 0, shard.valid)
        if entry.transposed:
            full = full.t()
        if len(entry.sources) == 1:
            return {entry.sources[0]: full.contiguous()}
        assert shard is not None and shard.blocks is not None
        parts = full.split(list(shard.blocks), shard.dim)
        return {source: part.contiguous() for source, part in zip(entry.sources, parts, strict=True)}

    return make


def _own_copies(tensors: dict[str, Tensor], live: list[Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory with the ``live`` ones, which will change."""
    places = {tensor.untyped_storage().data_ptr() for tensor in live}
    return {
        name: tensor.clone() if tensor.untyped_storage().data_ptr() in places else tensor
        for name, tensor in tensors.items()
    }


class _Writer:
    """Writes on one rank. An error is kept until every rank has gone through all collectives, so that none waits."""

    def __init__(
        self, folder: Path, later: list[Callable[[], None]] | None, on_bytes: Callable[[int], None] | None
    ) -> None:
        self.folder, self.later, self.on_bytes = folder, later, on_bytes
        self.records: dict[str, FileRecord] = {}
        self._error: Exception | None = None

    def add(self, action: Callable[[], None]) -> None:
        """Do it now, or leave it for later."""
        if self.later is not None:
            self.later.append(action)
        elif self._error is None:
            try:
                action()
            except Exception as error:
                self._error = error

    def weights(self, name: str, tensors: dict[str, Tensor]) -> None:
        def write() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.records[name] = write_tensors(self.folder / name, tensors, {"format": "pt"})
            if self.on_bytes is not None:
                self.on_bytes(self.records[name].size)

        self.add(write)

    def finish(self) -> None:
        if self._error is not None:
            raise self._error


def _write_index(folder: Path, shares: Shares) -> None:
    """Which file holds which tensor, where there are several."""
    if len(set(shares.places.values())) > 1:
        index = {"metadata": {"total_size": shares.num_bytes}, "weight_map": dict(sorted(shares.places.items()))}
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / INDEX, index)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_texts(
    folder: Path,
    model: Model,
    layout: ModuleType,
    tokenizer: Tokenizer | None,
    meta: Mapping[str, Any],
    dtype: torch.dtype,
    head: Head | None,
    further: Mapping[str, Any],
) -> None:
    """Everything beside the weights: configs, tokenizer, model card."""
    ids: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if tokenizer is not None:
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eod_id, "pad_token_id": tokenizer.pad_id}
        tokenizer.save(folder)
    if model.config.family == "t5":
        # T5 begins a text with its padding token; transformers' own ids where nothing says otherwise.
        ids = {"eos_token_id": 1, "pad_token_id": 0} | {key: value for key, value in ids.items() if value is not None}
        ids["decoder_start_token_id"] = ids["pad_token_id"]
    architecture = layout.architecture(model.config)
    if head is not None:
        architecture = _PRETRAINING.sub("", architecture) + head.architecture
    config = {
        "architectures": [architecture],
        **layout.write_config(model.config),
        "dtype": _DTYPE_NAMES[dtype],
        **ids,
        "mlm": kept_settings(model.config),
        **(head.config if head is not None else {}),
        **further,
    }
    _write_json(folder / "config.json", config)
    if head is None and model.config.family != "bert":
        _write_json(folder / "generation_config.json", {key: value for key, value in ids.items() if value is not None})
    extra = sum(tensor.numel() for tensor in head.tensors.values()) if head is not None else None
    weights = _DTYPE_NAMES[dtype]
    if compressed_tensors.KEY in further:
        weights = compressed_tensors.shown(weights)
    card = model_card(model.config, architecture, weights, meta, layout=layout.MODEL_TYPE, head_parameters=extra)
    (folder / "README.md").write_text(card, encoding="utf-8")
