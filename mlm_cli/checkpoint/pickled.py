"""Weights in torch's pickle format, read without running anything that is in the file.

A pickle may name any function and have it called. torch's weights-only unpickler calls none but those that build
tensors; beside them, checkpoints of Megatron-LM hold their command line (a namespace), enumerations and states of
random generators. These are let through as data: no module that a file names is imported for it.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlm_cli.checkpoint.manifest import FileRecord
from mlm_cli.checkpoint.tensor_file import write_tensors
from mlm_cli.checkpoint.weight_files import SINGLE, read_json
from mlm_cli.errors import CheckpointError

PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"


class Inert:
    """Stands where a file has an object of another class: it takes everything and keeps nothing."""

    def __new__(cls, *args: Any, **options: Any) -> Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# Plain containers of attributes, which become a namespace.
_NAMESPACES = ("argparse.Namespace", "types.SimpleNamespace")
# What training leaves in a checkpoint beside weights: enumerations of the command line, arrays of random states,
# loss scalers. None of it is needed, so none of it is built.
_INERT = re.compile(
    r"(megatron|fp16|apex|deepspeed|transformer_engine|numpy|signal|enum|datetime|pathlib)(\.\w+)+"
    r"|torch\.nn\.functional\.\w+|torch\._C\._nn\.\w+|_io\.BytesIO|builtins\.getattr"
)
_SCALERS = ("LossScaler", "DynamicLossScaler")
_ARRAYS = ("multiarray._reconstruct", "multiarray.scalar")
# Files from before torch 1.6 cannot be looked through beforehand: the names known from Megatron-LM's releases.
_OLD_NAMES = (
    "megatron.model.enums.ModelType",
    "megatron.core.enums.ModelType",
    *(f"{place}.{name}" for place in ("fp16.loss_scaler", "megatron.fp16.loss_scaler") for name in _SCALERS),
    *(f"{place}.{name}" for place in ("numpy.core", "numpy._core") for name in _ARRAYS),
    "numpy.ndarray",
    "numpy.dtype",
    "builtins.getattr",  # how Python 3.11 writes an enumeration
)


@contextmanager
def _only_these_globals(known: Sequence[Any]) -> Iterator[None]:
    """Let a weights-only load know the names in ``known`` and no others.

    Libraries add names of their own when they are imported (torch's sliced tensors add ``getattr``); what is read
    must not depend on that.
    """
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(list(known))
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)


def load_pickled(path: Path) -> Any:
    """What ``torch.save`` wrote to ``path``, on the CPU; tensors stay in the file until they are used.

    Raises:
        CheckpointError: missing, truncated or corrupt, or more than weights and plain values: then nothing was run.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing", hint="copy or download it again")
    whole = zipfile.is_zipfile(path)  # torch's format since 1.6
    try:
        names: Sequence[str] = _OLD_NAMES
        if whole:
            with _only_these_globals([]):
                names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        refused = sorted(name for name in names if name not in _NAMESPACES and not _INERT.fullmatch(name))
        if refused:
            raise _refused(path, ", ".join(refused[:3]))
        known: list[Any] = [(argparse.Namespace, name) for name in _NAMESPACES]
        known += [(Inert, name) for name in names if name not in _NAMESPACES]
        with _only_these_globals(known):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=whole)
    except pickle.UnpicklingError as error:
        text = str(error)
        if asked := re.search(r"GLOBAL (\S+)", text):
            raise _refused(path, asked.group(1)) from None
        if re.search(r"unrecognized function|Can only (create|build)|Unsupported (operand|class)", text):
            raise _refused(path, "calls that build no tensor") from None
        raise _corrupt(path, error) from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        # Whatever a damaged pickle stream trips over.
        raise _corrupt(path, error) from None


def _refused(path: Path, names: str) -> CheckpointError:
    return CheckpointError(
        f"{path} holds more than weights and is not read: it asks for {names}",
        hint="if you trust it, load it where it was made and save the weights as safetensors",
    )


def _corrupt(path: Path, error: Exception) -> CheckpointError:
    first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return CheckpointError(
        f"{path} is truncated or corrupt ({path.stat().st_size} bytes: {first})",
        hint="copy or download the file again, or use an earlier checkpoint",
    )


def repack_pickled(folder: Path, target: Path) -> FileRecord:
    """Write the pickled weights of a Hugging Face ``folder`` as ``model.safetensors`` in ``target``.

    Buffers that are no floating-point numbers (attention masks of old files) are left out, as transformers does.

    Raises:
        CheckpointError: no pickled weights there, a part of them missing or damaged, or more than weights in them.
    """
    tensors: dict[str, Tensor] = {}
    for path in _pickled_files(folder):
        found = load_pickled(path)
        if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
            raise CheckpointError(f"{path} does not hold a dictionary of tensors")
        tensors |= {name: tensor for name, tensor in found.items() if tensor.is_floating_point()}
    return write_tensors(target / SINGLE, tensors, {"format": "pt"})


def _pickled_files(folder: Path) -> list[Path]:
    if (folder / PICKLED_INDEX).is_file():
        mapping = read_json(folder / PICKLED_INDEX).get("weight_map")
        if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
            raise CheckpointError(f"{folder / PICKLED_INDEX} has no `weight_map` of tensor names to file names")
        names = sorted(set(mapping.values()))
        outside = next((name for name in names if Path(name).name != name), None)
        if outside is not None:
            raise CheckpointError(f"{folder / PICKLED_INDEX} names a file outside the folder: {outside!r}")
        return [folder / name for name in names]
    if (folder / PICKLED).is_file():
        return [folder / PICKLED]
    raise CheckpointError(f"{folder} holds no {PICKLED} (nor {PICKLED_INDEX})", hint="leave out --from-pickle")
