"""Models on disk, in and out: the Hugging Face layout (``model/`` of a checkpoint, exported folders, the Hub), and
Megatron-LM's classic layout, which is read wherever a model is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlm_cli.checkpoint import hub_read, megatron_read
from mlm_cli.checkpoint.hub_read import TASK, task_class, trained_task
from mlm_cli.checkpoint.hub_write import Head, check_vocabulary, save_model_folder
from mlm_cli.checkpoint.key_map import ConfigReader
from mlm_cli.checkpoint.megatron_folder import is_megatron_folder
from mlm_cli.checkpoint.resolve import resolve_model
from mlm_cli.checkpoint.weight_files import WeightFiles
from mlm_cli.config.schema import ModelSection
from mlm_cli.models.model import Model
from mlm_cli.parallel.context import ParallelContext

__all__ = [
    "TASK",
    "Head",
    "WeightFiles",
    "check_vocabulary",
    "load_model_folder",
    "read_model_config",
    "resolve_model",
    "save_model_folder",
    "task_class",
    "trained_task",
]


def read_model_config(folder: Path) -> tuple[ModelSection, ConfigReader]:
    """The model section of a folder in either layout, and its ``config.json`` (or what stands for it)."""
    return (megatron_read if is_megatron_folder(folder) else hub_read).read_model_config(folder)


def load_model_folder(folder: str | Path, parallel: ParallelContext, **options: Any) -> tuple[Model, ModelSection]:
    """This rank's slice of a model in either layout; see ``hub_read.load_model_folder`` for options and errors."""
    read = megatron_read if is_megatron_folder(Path(folder)) else hub_read
    return read.load_model_folder(folder, parallel, **options)
