"""Weights of the compressed-tensors format (vllm-project/compressed-tensors): int8 with a scale an output channel.

A matrix ``NAME.weight`` is int8 ``[out, in]``, beside it lies ``NAME.weight_scale``, floating point ``[out, 1]``. The
entry ``quantization_config`` of ``config.json`` says that it is so. Other kinds of that format are refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mlm_cli.checkpoint.key_map import ConfigReader
from mlm_cli.checkpoint.weight_files import WeightFiles
from mlm_cli.errors import CheckpointError

KEY, METHOD = "quantization_config", "compressed-tensors"
_SCALE = "_scale"
_FORMATS = ("int-quantized", "naive-quantized")
_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
_DEFAULTS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}  # what the format leaves out


def scale_name(weight: str) -> str:
    """The tensor that holds the scales of another."""
    return weight + _SCALE


def entry(ignore: Iterable[str]) -> dict[str, Any]:
    """``quantization_config`` of a model whose linear layers are int8, but for the modules in ``ignore``."""
    group: dict[str, Any] = {"targets": ["Linear"], "weights": dict(_WEIGHTS), "format": _FORMATS[0]}
    group |= {"input_activations": None, "output_activations": None}
    return {
        "quant_method": METHOD,
        "format": _FORMATS[0],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": sorted(ignore),
        "kv_cache_scheme": None,
    }


def shown(rest: str) -> str:
    """What a model card says of the type of the weights; ``rest``: of those that are not int8."""
    return f"int8 in the layers ({METHOD}), {rest} elsewhere"


def is_quantized(config: ConfigReader) -> bool:
    """Whether the folder's matrices may be int8 with scales.

    Raises:
        CheckpointError: weights quantised in another way, or activations to be quantised too.
    """
    given = config.get(KEY, dict, {})
    if not given:
        return False
    wrong = _difference(given)
    if wrong is not None:
        raise CheckpointError(
            f"{config.where}: quantised weights of this kind are not read: `{KEY}.{wrong}`",
            hint="int8 with a scale an output channel is read (compressed-tensors, int-quantized); else name the model "
            "that these weights were made from",
        )
    return True


def _difference(given: dict[str, Any]) -> str | None:
    """The first setting that asks for something we would compute otherwise, as ``key: value``."""
    if given.get("quant_method") != METHOD:
        return f"quant_method: {given.get('quant_method')}"
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if given.get(key) not in (None, {}) and not _is_dense(given[key]):
            return f"{key}: {given[key]}"
    if given.get("quantization_status", "compressed") != "compressed":
        return f"quantization_status: {given['quantization_status']}"
    groups = given.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return f"config_groups: {groups}"
    for name, group in groups.items():
        if not isinstance(group, dict):
            return f"config_groups.{name}: {group}"
        form = group.get("format") or given.get("format")
        if form not in _FORMATS:
            return f"format: {form}"
        for key in ("input_activations", "output_activations"):
            if group.get(key) is not None:
                return f"config_groups.{name}.{key}: {group[key]}"
        weights = group.get("weights")
        if not isinstance(weights, dict):
            return f"config_groups.{name}.weights: {weights}"
        found = _DEFAULTS | weights
        for key, value in _WEIGHTS.items():
            if found.get(key) != value:
                return f"config_groups.{name}.weights.{key}: {found.get(key)}"
    return None


def _is_dense(value: Any) -> bool:
    """What older files say of weights that are not sparse."""
    return isinstance(value, dict) and value.get("format") == "dense"


def check_matrix(files: WeightFiles, name: str, shape: tuple[int, ...]) -> None:
    """Raise unless tensor ``name`` is there with this shape, as floating point, or as int8 with scales that fit."""
    if name not in files or not files.is_int8(name):
        files.check_shape(name, shape)
        return
    files.check_shape(name, shape, dtypes=("I8",))
    files.check_shape(scale_name(name), (shape[0], 1))


def read_scales(files: WeightFiles, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
    """Scales of rows ``start:stop`` of a matrix, ``[rows]``.

    Raises:
        CheckpointError: a scale that is negative or no number.
    """
    scales = files.read(scale_name(name), 0, start, stop).squeeze(1)
    if not (scales.isfinite() & (scales >= 0)).all():
        raise CheckpointError(
            f"{files.file_of(name)}: tensor {scale_name(name)} holds scales that are negative or no number",
            hint="copy or download the file again",
        )
    return scales


def scale_dtype(files: WeightFiles, names: Iterable[str]) -> torch.dtype:
    """One type that holds the scales of several matrices."""
    dtypes = {files.read(scale_name(name), 0, 0, 1).dtype for name in names}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32
