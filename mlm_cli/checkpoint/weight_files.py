"""Reading parts of tensors from one ``model.safetensors`` or an index of several; never a pickle."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mlm_cli.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: it is missing, unreadable, not JSON or not an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}", hint="copy or download the file again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(values).__name__}")
    return values


class WeightFiles:
    """The tensors of a model folder by name, read in slices from mapped files.

    Raises:
        CheckpointError: no safetensors, a shard missing, truncated or corrupt, or the index disagrees with the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._of: dict[str, str] = {}
        if (folder / SINGLE).is_file():  # before an index, as transformers does where both are there
            self._open(SINGLE)
            self._of = dict.fromkeys(self._files[SINGLE].keys(), SINGLE)
        elif (folder / INDEX).is_file():
            self._open_index()
        else:
            pickled = sorted(folder.glob("pytorch_model*.bin"))
            raise CheckpointError(
                f"{folder} holds no {SINGLE} (nor {INDEX})" + (f", only {pickled[0].name}" if pickled else ""),
                hint=f"pickled weights take a step of their own: `mlm convert {folder} NEW --to hf --from-pickle`"
                if pickled
                else None,
            )

    def _open(self, name: str) -> Any:
        path = self.folder / name
        if name not in self._files:
            if not path.is_file():
                raise CheckpointError(f"{path} is missing", hint=f"it is named in {INDEX}; copy or download it again")
            try:
                self._files[name] = safe_open(path, framework="pt")
            except (SafetensorError, OSError, ValueError) as error:
                raise self._corrupt(name, error) from None
        return self._files[name]

    def _corrupt(self, name: str, error: Exception) -> CheckpointError:
        size = (self.folder / name).stat().st_size
        return CheckpointError(
            f"{self.folder / name} is truncated or corrupt ({size} bytes: {error})",
            hint="copy or download the file again, or use an earlier checkpoint",
        )

    def _open_index(self) -> None:
        mapping = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(mapping, dict) or not all(isinstance(file, str) for file in mapping.values()):
            raise CheckpointError(f"{self.folder / INDEX} has no `weight_map` of tensor names to file names")
        for tensor, file in mapping.items():
            if Path(file).name != file:
                raise CheckpointError(f"{self.folder / INDEX}: tensor {tensor} lies outside the folder: {file!r}")
        for file in sorted(set(mapping.values())):
            held = set(self._open(file).keys())
            lost = sorted(tensor for tensor, where in mapping.items() if where == file and tensor not in held)
            if lost:
                raise CheckpointError(f"{self.folder / file} lacks tensor {lost[0]}, which {INDEX} places there")
        self._of = dict(mapping)

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._files.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._of

    def names(self) -> list[str]:
        return list(self._of)

    def file_of(self, name: str) -> Path:
        return self.folder / self._of.get(name, SINGLE if (self.folder / SINGLE).is_file() else INDEX)

    def numel(self, name: str) -> int:
        """Elements of a tensor."""
        return math.prod(self._files[self._of[name]].get_slice(name).get_shape())

    def is_int8(self, name: str) -> bool:
        """Whether a tensor that is there has 8-bit integers."""
        return bool(self._files[self._of[name]].get_slice(name).get_dtype() == "I8")

    def check_shape(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...] = _FLOATS) -> None:
        """Raise unless tensor ``name`` is there with this shape and one of ``dtypes``, unset: floating point."""
        if name not in self._of:
            raise CheckpointError(f"{self.file_of(name)}: tensor {name} is missing")
        view = self._files[self._of[name]].get_slice(name)
        found = tuple(view.get_shape())
        if found != shape:
            raise CheckpointError(
                f"{self.file_of(name)}: tensor {name} has shape {list(found)}, config.json asks for {list(shape)}"
            )
        if view.get_dtype() not in dtypes:
            raise CheckpointError(
                f"{self.file_of(name)}: tensor {name} has type {view.get_dtype()}, not one of {', '.join(dtypes)}"
            )

    def read(self, name: str, dim: int = 0, start: int | None = None, stop: int | None = None) -> Tensor:
        """Entries ``start:stop`` along ``dim`` of a tensor; only these bytes are touched."""
        file = self._of[name]
        try:
            if start is None:
                return self._files[file].get_tensor(name)
            view = self._files[file].get_slice(name)
            return view[start:stop] if dim == 0 else view[:, start:stop]
        except (SafetensorError, OSError) as error:
            raise self._corrupt(file, error) from None
