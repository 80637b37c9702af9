"""Models in the Hugging Face layout, in and out: ``model/`` of a checkpoint, exported folders, the Hub."""

from __future__ import annotations

from mlm_cli.checkpoint.hub_read import load_model_folder, read_model_config, task_class
from mlm_cli.checkpoint.hub_write import Head, check_vocabulary, save_model_folder
from mlm_cli.checkpoint.resolve import resolve_model
from mlm_cli.checkpoint.weight_files import WeightFiles

__all__ = [
    "Head",
    "WeightFiles",
    "check_vocabulary",
    "load_model_folder",
    "read_model_config",
    "resolve_model",
    "save_model_folder",
    "task_class",
]
