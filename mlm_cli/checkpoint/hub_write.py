"""Writing a model in Hugging Face layout from the slices of its ranks, a few tensors at a time. No pickle."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlm_cli.checkpoint import map_own
from mlm_cli.checkpoint.hub_read import LAYOUTS
from mlm_cli.checkpoint.key_map import Entry, KeyMap, kept_settings
from mlm_cli.checkpoint.manifest import FileRecord
from mlm_cli.checkpoint.model_card import model_card
from mlm_cli.checkpoint.tensor_file import write_tensors
from mlm_cli.checkpoint.weight_files import INDEX, SINGLE
from mlm_cli.config.schema import ModelSection
from mlm_cli.config.shapes import hub_layout, is_sparse
from mlm_cli.data.tokenizer import Tokenizer
from mlm_cli.errors import CheckpointError, UsageError
from mlm_cli.models.model import Model
from mlm_cli.parallel.context import Group, ParallelContext
from mlm_cli.parallel.shard import gather_full, shard_of

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
    head: Head | None = None,
    config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 4 << 30,
    later: list[Callable[[], None]] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> dict[str, FileRecord]:
    """Write ``model`` in Hugging Face layout. All ranks call; group rank 0 of the tensor group writes.

    A layer at a time is gathered, so no rank ever holds the whole model twice. Data-parallel copies hold the same: only
    data rank 0 does anything.

    Args:
        folder: made if needed.
        tokenizer: its files travel with the model.
        meta: facts for the model card (``data``, ``steps``, ``tokens``, ``loss``, ...).
        weights: slices to write instead of the model's own, by full parameter name (float32 masters).
        dtype: of the files; unset: that of the weights.
        head: of a task, where the model was built without one of its own.
        config: further entries for ``config.json``.
        max_shard_bytes: files grow no larger; more than one get an index.
        later: nothing is written now: a copy of the weights is taken, and what is left to do with it is added to this
            list, to be called in order, in any thread (no collectives are left).
        on_bytes: told the bytes of each weight file, on the rank that writes, when it is written.

    Returns:
        size and SHA-256 of each weight file (empty on ranks that write nothing; with ``later``, until that is done).

    Raises:
        CheckpointError: the tokenizer has more tokens than the model.
        UsageError: no Hugging Face architecture holds this model.
        OSError: from the file system (a full disk), on the writing rank, after all ranks have done their part.
    """
    if tokenizer is not None:
        check_vocabulary(model.config, tokenizer)
    assert head is None or model.head is None, "a task's head stands in place of the model's own"
    layout = LAYOUTS[hub_layout(model.config)]
    if model.parallel.replicas.rank != 0:
        return {}
    first_slice = model.parallel.tensor.rank == 0 and model.parallel.pipeline.rank == 0
    writer = _Writer(Path(folder), first_slice, later, on_bytes)
    key_map: KeyMap = layout.key_map(model.config)
    prefix = getattr(layout, "TASK_PREFIX", {}).get(head.architecture if head is not None else None)
    if prefix:
        key_map = key_map.with_prefix(prefix)
    jobs = _jobs(model, key_map, weights, dtype, head)
    if model.parallel.pipeline.size > 1:
        jobs = _from_all_stages(jobs, model.parallel.pipeline)
    for number, shard in enumerate(_split(jobs, max_shard_bytes)):
        tensors = {name: tensor for job in shard for name, tensor in job.make().items()}
        if later is not None:
            tensors = _own_copies(
                tensors, [*model.parameters(), *(weights or {}).values(), *(head.tensors.values() if head else ())]
            )
        writer.weights(number, tensors)
    out_dtype = dtype or _dtype_of(model, weights)
    writer.finish(lambda: _write_texts(Path(folder), model, layout, tokenizer, meta or {}, out_dtype, head, config))
    return writer.records


def check_vocabulary(model: ModelSection, tokenizer: Tokenizer, where: str = "the model") -> None:
    """Refuse a tokenizer that can give ids the model has no rows for."""
    if model.vocab_size is not None and tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"{where} has {model.vocab_size} tokens, its tokenizer `{tokenizer.name}` {tokenizer.vocab_size}",
            hint="use the tokenizer the model was trained with",
        )


def refuse_inexpressible(model: ModelSection) -> None:
    """Raise unless transformers, given the folder alone, computes what we do.

    Raises:
        UsageError: naming what it has no architecture for.
    """
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


@dataclass(frozen=True)
class _Job:
    """Some tensors that will be written: their size now, themselves when asked (a collective over the tensor group)."""

    num_bytes: int
    make: Callable[[], dict[str, Tensor]]


def _jobs(
    model: Model, key_map: KeyMap, weights: Mapping[str, Tensor] | None, dtype: torch.dtype | None, head: Head | None
) -> list[_Job]:
    jobs = []
    for name, param in model.named_parameters():
        if name in model.copies:
            continue  # its owner, an earlier stage, writes it
        local = weights[name] if weights is not None else param.detach()
        kind = dtype or local.dtype
        size = local.numel() * (model.parallel.tensor.size if shard_of(param) else 1) * kind.itemsize
        jobs.append(_Job(size, _maker(local, param, key_map.entries[name], kind, model.parallel)))
    default = dtype or _dtype_of(model, weights)
    zeros = {name: torch.zeros(shape, dtype=default) for name, shape in key_map.zeros.items()}
    extra = {name: tensor.detach().to(default) for name, tensor in head.tensors.items()} if head else {}
    for name, tensor in (zeros | extra).items() if model.has_embedding else ():
        jobs.append(_Job(tensor.numel() * tensor.element_size(), lambda pair=(name, tensor): dict([pair])))
    return jobs


def _from_all_stages(own: list[_Job], pipeline: Group) -> list[_Job]:
    """The jobs of all stages in order, each done by its stage and handed to the first, which writes."""
    sizes: list[Any] = [None] * pipeline.size
    dist.all_gather_object(sizes, [job.num_bytes for job in own], group=pipeline.handle)

    def job(stage: int, number: int) -> _Job:
        def make() -> dict[str, Tensor]:
            tensors = own[number].make() if pipeline.rank == stage else {}
            return pipeline.to_first(tensors, stage)

        return _Job(sizes[stage][number], make)

    return [job(stage, number) for stage in range(pipeline.size) for number in range(len(sizes[stage]))]


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


def _split(jobs: list[_Job], most: int) -> list[list[_Job]]:
    """Consecutive jobs that fit into one file each."""
    shards: list[list[_Job]] = [[]]
    size = 0
    for job in jobs:
        if shards[-1] and size + job.num_bytes > most:
            shards.append([])
            size = 0
        shards[-1].append(job)
        size += job.num_bytes
    return shards


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
        self,
        folder: Path,
        active: bool,
        later: list[Callable[[], None]] | None = None,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        self.folder, self.active, self.later, self.on_bytes = folder, active, later, on_bytes
        self.records: dict[str, FileRecord] = {}
        self._names: list[list[str]] = []
        self._bytes = 0
        self._error: Exception | None = None

    def _try(self, action: Callable[[], None]) -> None:
        if self.active and self.later is not None:
            self.later.append(action)
        elif self.active and self._error is None:
            try:
                action()
            except Exception as error:
                self._error = error

    def weights(self, number: int, tensors: dict[str, Tensor]) -> None:
        def write() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"model-{number + 1:05d}.safetensors"
            self.records[name] = write_tensors(self.folder / name, tensors, {"format": "pt"})
            self._names.append(list(tensors))
            self._bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            if self.on_bytes is not None:
                self.on_bytes(self.records[name].size)

        self._try(write)

    def finish(self, write_texts: Callable[[], None]) -> None:
        self._try(self._name_files)
        self._try(write_texts)
        if self._error is not None:
            raise self._error

    def _name_files(self) -> None:
        """One file gets the plain name; several say how many there are and get an index."""
        count, weight_map, records = len(self._names), {}, {}
        for number, names in enumerate(self._names):
            old = f"model-{number + 1:05d}.safetensors"
            new = SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self.folder / old).rename(self.folder / new)
            records[new] = self.records[old]
            weight_map.update(dict.fromkeys(names, new))
        self.records.clear()  # in place: who was given them before anything was written sees them too
        self.records.update(records)
        if count > 1:
            index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(weight_map.items()))}
            _write_json(self.folder / INDEX, index)


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
    further: Mapping[str, Any] | None,
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
        **(further or {}),
    }
    _write_json(folder / "config.json", config)
    if head is None and model.config.family != "bert":
        _write_json(folder / "generation_config.json", {key: value for key, value in ids.items() if value is not None})
    extra = sum(tensor.numel() for tensor in head.tensors.values()) if head is not None else None
    card = model_card(model.config, architecture, _DTYPE_NAMES[dtype], meta, head_parameters=extra)
    (folder / "README.md").write_text(card, encoding="utf-8")
