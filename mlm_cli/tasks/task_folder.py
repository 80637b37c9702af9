"""Task models on disk, in the layout of transformers' class for the task; starting one from a pretrained model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from mlm_cli import log
from mlm_cli.checkpoint.hub import (
    TASK,
    Head,
    WeightFiles,
    load_model_folder,
    read_model_config,
    save_model_folder,
    task_class,
    trained_task,
)
from mlm_cli.checkpoint.hub_read import LAYOUTS, find, head_tensors, key_map_of
from mlm_cli.checkpoint.key_map import ConfigReader, KeyMap
from mlm_cli.checkpoint.manifest import FileRecord
from mlm_cli.checkpoint.megatron_folder import is_megatron_folder
from mlm_cli.checkpoint.text_ends import start_id
from mlm_cli.config.schema import ModelSection, TaskSection
from mlm_cli.config.shapes import hub_layout
from mlm_cli.config.tasks import WRITTEN_KINDS
from mlm_cli.data.tokenizer import Tokenizer
from mlm_cli.errors import CheckpointError, UsageError
from mlm_cli.models.heads import HeadSpec, TaskModel
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.tasks.encoding import pad_id_of
from mlm_cli.tasks.task import Task
from mlm_cli.tasks.writing import Writing, affixes_of


@dataclass(frozen=True)
class TaskFacts:
    """What the ``config.json`` of a task's model says beside the architecture of its backbone.

    Attributes:
        labels: names of the classes; empty where the task has none.
        max_length: longest text it was trained on.
        settings: keys of the ``task`` section that it cannot be used rightly without (how an embedding is pooled).
        section: the backbone.
    """

    labels: tuple[str, ...]
    max_length: int
    settings: Mapping[str, Any]
    section: ModelSection


def start_task_model(
    folder: Path,
    parallel: ParallelContext,
    spec: HeadSpec,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    changes: Mapping[str, Any] | None = None,
) -> TaskModel:
    """A model with the weights of the one in ``folder`` and a new head, or with its own where texts are written.

    The folder's own head, of pretraining or of another task, is left out, but for its pooler: the new head goes on with
    that where it has one. Every tensor of the files is accounted for.

    Args:
        changes: settings of the model section that weights do not depend on, such as dropout.

    Raises:
        CheckpointError: the folder holds no model that can be read.
    """
    section, config = read_model_config(folder)
    backbone, section = load_model_folder(folder, parallel, dtype=dtype, head=spec.own, changes=changes)
    model = TaskModel(backbone, spec, seed=seed)
    if spec.own or is_megatron_folder(folder):
        return model  # causal models alone, whose only head was left out
    layout, kept = key_map_of(section, config), set[str]()
    with WeightFiles(folder) as files:
        pooler = {
            ours: theirs
            for ours, theirs in _pooler_names(section).items()
            if ours in dict(model.head.named_parameters())
        }
        if any(find(theirs, files, layout) for theirs in pooler.values()):
            kept = _fill_head(model, files, pooler, layout)
        left = sorted(head_tensors(config, files) - kept)
    fresh = [name for name, _ in model.head.named_parameters() if not (kept and name.startswith("pooler."))]
    log.detail(
        f"{folder}: every tensor of the model itself is taken{', and its pooler' if kept else ''}; new: "
        f"{', '.join(fresh) or 'nothing'}; left out: {', '.join(left) or 'nothing'}"
    )
    return model


def save_task_model(
    model: TaskModel,
    task: Task,
    folder: Path,
    *,
    meta: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    int8: bool = False,
    later: list[Callable[[], None]] | None = None,
) -> dict[str, FileRecord]:
    """Write the model as transformers' class for its task. All ranks call.

    ``int8``, ``later`` and what is returned: as in ``save_model_folder``.
    """
    section, settings = model.backbone.config, {key: getattr(task.section, key) for key in task.kept}
    about = {TASK: {"name": task.name, "max_length": task.encoder.max_length, **settings}}
    if model.head is None:
        return save_model_folder(
            model.backbone, folder, task.encoder.tokenizer, meta=meta, dtype=dtype, int8=int8, config=about, later=later
        )
    architecture = task.architecture(section)
    config = {"pad_token_id": task.encoder.pad_id, **task.config(), **about}
    names = _head_names(section, architecture)
    tensors: dict[str, Tensor] = {names[ours]: param.detach().cpu() for ours, param in model.head.named_parameters()}
    head = Head(architecture, tensors, config)
    return save_model_folder(
        model.backbone, folder, task.encoder.tokenizer, meta=meta, dtype=dtype, int8=int8, head=head, later=later
    )


def load_task_model(
    folder: Path,
    parallel: ParallelContext,
    spec: HeadSpec,
    *,
    dtype: torch.dtype = torch.float32,
    keep_int8: bool = False,
) -> TaskModel:
    """Open a task's model at any tensor size; ours or one that transformers saved.

    ``keep_int8``: as in ``load_model_folder``.

    Raises:
        CheckpointError: damaged, or without the head that ``spec`` asks for.
    """
    section, config = read_model_config(folder)
    backbone, section = load_model_folder(folder, parallel, dtype=dtype, head=spec.own, keep_int8=keep_int8)
    model = TaskModel(backbone, spec, seed=None)
    if spec.own:
        return model
    with WeightFiles(folder) as files:
        names = _head_names(section, task_class(config) or "Model")
        used = _fill_head(model, files, names, key_map_of(section, config))
        spare = head_tensors(config, files) - used
        if spare and spec.reads != "embedding":  # which any model without a head has, and reads no head
            raise CheckpointError(f"{files.file_of(min(spare))}: unexpected tensor {min(spare)}")
    return model


def read_facts(folder: Path, kind: type[Task]) -> TaskFacts:
    """Labels and limits from ``config.json``.

    Raises:
        CheckpointError: the model in ``folder`` is not one of this kind of task.
    """
    section, config = read_model_config(folder)
    own = _entry(config, kind)
    if issubclass(kind, Writing):
        return _facts_of_writing(folder, kind, section, config, own)
    wanted, found = kind.architecture(section), task_class(config) or "Model"
    named = config.get("architectures", list, [])
    what = named[0] if named else "model without architecture"
    if own and own.get("name") != kind.name:
        what = f"model for {str(own.get('name')).replace('_', ' ')}"
    if wanted != found or (own and own.get("name") != kind.name):
        raise CheckpointError(
            f"{folder} holds a {what}, not a model for {kind.name.replace('_', ' ')}",
            hint="train one with `mlm finetune`, and name its run folder",
        )
    if config.get("problem_type", str, kind.name) == "regression" and kind.name == "classification":
        raise CheckpointError(f"{folder} was trained for regression", hint="use --task regression")
    default = {"0": "LABEL_0", "1": "LABEL_1"}
    labels = _labels(config.get("id2label", dict, default), folder) if kind.has_labels else ()
    settings = {key: own[key] for key in kind.kept if key in own}
    return TaskFacts(labels, int(own.get("max_length") or section.seq_length), settings, section)


def prompt_affixes(config: ConfigReader, family: str) -> tuple[str, str]:
    """What stood before and behind each text where the model of this ``config.json`` learned to write, else nothing."""
    if trained_task(config) not in WRITTEN_KINDS:
        return "", ""
    return affixes_of(_entry(config, Writing), family)


def _entry(config: ConfigReader, kind: type[Task]) -> dict[str, Any]:
    """What ``config.json`` says of the task that we fine-tuned the model to; settings as ``kind`` has them.

    Raises:
        CheckpointError: a value that is none, naming file and key.
    """
    own = config.get(TASK, dict, {})
    known = {key: own[key] for key in ("max_length", *kind.kept) if key in own}
    try:
        checked = TaskSection.model_validate({"train": "", "dev": "", **known}, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{config.where}: `{TASK}.{key}` is {first['input']!r}: {first['msg']}") from None
    return {**own, **{key: getattr(checked, key) for key in known}}


def check_decoder_start(folder: Path, section: ModelSection, tokenizer: Tokenizer) -> None:
    """Raise CheckpointError where a T5 begins its texts with another token than its padding, as tasks have it."""
    padding = pad_id_of(tokenizer)
    if section.family == "t5" and (start := start_id(folder, section)) != padding:
        raise CheckpointError(
            f"{folder}: `decoder_start_token_id` is {start}, the tokenizer's padding {padding}",
            hint="tasks are learned by a T5 whose texts begin with its padding token",
        )


def _facts_of_writing(
    folder: Path, kind: type[Task], section: ModelSection, config: ConfigReader, own: Mapping[str, Any]
) -> TaskFacts:
    """Any model that writes will do; settings are those of this kind, should it have been trained for it."""
    kind.check_family(section)
    trained = trained_task(config)
    if task_class(config) is not None or trained not in (None, *WRITTEN_KINDS):
        raise CheckpointError(
            f"{folder} holds a model for {(trained or 'classification').replace('_', ' ')}, which writes no texts",
            hint=f"train one with `mlm finetune` and task.name={kind.name}, and name its run folder",
        )
    mine = trained == kind.name
    settings = {key: own[key] for key in kind.kept if key in own} if mine else {}
    return TaskFacts((), int((own.get("max_length") if mine else None) or section.seq_length), settings, section)


def _labels(id2label: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    try:
        by_number: dict[int, str] = {int(number): str(label) for number, label in id2label.items()}
        labels: Sequence[str] = [by_number[number] for number in range(len(by_number))]
    except (ValueError, KeyError):
        raise CheckpointError(f"{folder / 'config.json'}: `id2label` does not number its labels from 0") from None
    return tuple(labels)


def _head_names(section: ModelSection, architecture: str) -> Mapping[str, str]:
    """Parameters of a head -> names of their tensors in the files of one of transformers' classes."""
    layout = hub_layout(section)
    known: Mapping[str, Mapping[str, str]] = getattr(LAYOUTS[layout], "TASK_HEADS", {})
    if architecture not in known:
        raise UsageError(
            f"transformers has no {architecture} for {layout} models, and so the result could not be opened"
        )
    return known[architecture]


def _pooler_names(section: ModelSection) -> dict[str, str]:
    """Where the layout keeps the pooler, which is the same in all its classes."""
    heads: Mapping[str, Mapping[str, str]] = getattr(LAYOUTS[hub_layout(section)], "TASK_HEADS", {})
    return {ours: theirs for names in heads.values() for ours, theirs in names.items() if ours.startswith("pooler.")}


@torch.no_grad()
def _fill_head(model: TaskModel, files: WeightFiles, names: Mapping[str, str], layout: KeyMap) -> set[str]:
    """Copy the head's parameters that ``names`` has from the files; returns the tensors taken."""
    params, taken = dict(model.head.named_parameters()), set()
    for ours, theirs in names.items():
        found = find(theirs, files, layout) or theirs
        files.check_shape(found, tuple(params[ours].shape))
        params[ours].copy_(files.read(found))
        taken.add(found)
    return taken
