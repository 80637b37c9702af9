"""A checkpoint folder of Megatron-LM in its classic layout, opened: which files there are, and their tensors by name.

::

    FOLDER/latest_checkpointed_iteration.txt      "123" or "release"
    FOLDER/iter_0000123/mp_rank_00/model_optim_rng.pt          tensor rank 00
    FOLDER/iter_0000123/mp_rank_00_001/model_optim_rng.pt      tensor rank 00, pipeline stage 001
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mlm_cli.checkpoint.megatron_keys import FAMILIES, HEAD_WORDS, IGNORED, LAYER, VERSIONS, WORDS, Family, canonical
from mlm_cli.checkpoint.pickled import load_pickled
from mlm_cli.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
RANK_FILE = "model_optim_rng.pt"
_ITERATION = re.compile(r"iter_(\d{7,})|release")
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_LAYER = re.compile(re.escape(LAYER) + r"(\d+)\.(.+)")


def is_megatron_folder(folder: Path) -> bool:
    """Whether ``folder`` looks like a checkpoint of Megatron-LM, or one iteration of it."""
    if (folder / TRACKER).is_file():
        return True
    return _ITERATION.fullmatch(folder.absolute().name) is not None and any(folder.glob("mp_rank_*"))


def rank_folder(tensor: int, stage: int, pipeline: int) -> str:
    """Name of the folder of one rank, as Megatron-LM gives it."""
    return f"mp_rank_{tensor:02d}" + (f"_{stage:03d}" if pipeline > 1 else "")


def iteration_folder(iteration: int | None) -> str:
    """Name of the folder of one iteration; None: a model released without a place in training."""
    return "release" if iteration is None else f"iter_{iteration:07d}"


@dataclass(frozen=True)
class MegatronFiles:
    """The files of one iteration, opened and found to belong together.

    Attributes:
        folder: of the iteration.
        args: Megatron's command line, where the files have it.
        version: of the layout (``checkpoint_version``).
        iteration: None: not recorded.
        tensor, pipeline: ranks that wrote it.
        tensors: canonical name (layers numbered over all stages) -> the slices of all tensor ranks.
        paths: canonical name -> the file of each slice.
        family: what kind of model it is.
    """

    folder: Path
    args: Namespace | None
    version: float
    iteration: int | None
    tensor: int
    pipeline: int
    tensors: dict[str, list[Tensor]]
    paths: dict[str, list[Path]]
    family: Family

    @property
    def main(self) -> Path:
        """The first rank's file, to name in errors that concern all."""
        return self.folder / rank_folder(0, 0, self.pipeline) / RANK_FILE

    @property
    def num_layers(self) -> int:
        return len({match.group(1) for name in self.tensors if (match := _LAYER.fullmatch(name))})


def open_megatron(folder: Path) -> MegatronFiles:
    """Open the newest iteration in ``folder``, or the iteration that ``folder`` is.

    Raises:
        CheckpointError: a rank's file missing, truncated or of another iteration, another layout, more than weights in
            a file, an unknown version, or a kind of model that is not known.
    """
    where = _find_iteration(folder)
    files = _find_ranks(where)
    tensor, pipeline = 1 + max(t for t, _ in files), 1 + max(p for _, p in files)
    states = {rank: load_pickled(path) for rank, path in sorted(files.items(), key=lambda item: item[0][::-1])}
    for rank, state in states.items():
        if not isinstance(state, dict) or not ("model" in state or "model0" in state):
            raise CheckpointError(f"{files[rank]} holds no `model`: it is no checkpoint of Megatron-LM")
        _refuse_core(state, files[rank])
    args = _agreed(states, files, where, tensor, pipeline)
    first = states[0, 0]
    tensors, paths = _merge_stages(states, files, tensor, pipeline)
    for slices, copies in zip(tensors.get(HEAD_WORDS, []), tensors.get(WORDS, []), strict=False):
        if not slices.equal(copies):
            raise CheckpointError(f"{paths[HEAD_WORDS][0]}: {HEAD_WORDS} is not a copy of the first stage's {WORDS}")
    tensors.pop(HEAD_WORDS, None)
    iteration = first.get("iteration")
    return MegatronFiles(
        where,
        args,
        _version(first, files[0, 0]),
        None if where.name == "release" or not isinstance(iteration, int) else iteration,
        tensor,
        pipeline,
        tensors,
        paths,
        _family(set(tensors), files[0, 0]),
    )


def _find_iteration(folder: Path) -> Path:
    tracker = folder / TRACKER
    if not tracker.is_file():
        return folder
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text != "release" and not text.isdecimal():
        raise CheckpointError(f"{tracker} names neither an iteration nor `release`: {text[:80]!r}")
    where = folder / iteration_folder(None if text == "release" else int(text))
    if not where.is_dir():
        raise CheckpointError(f"{tracker} names {where.name}, which is not there", hint=f"name one of {folder}/iter_*")
    return where


def _find_ranks(where: Path) -> dict[tuple[int, int], Path]:
    """(tensor rank, stage) -> its file; all ranks up to the highest must be there."""
    if list(where.glob("*.distcp")) or (where / "metadata.json").is_file():
        raise CheckpointError(
            f"{where} is a distributed checkpoint of Megatron-Core, not the classic layout",
            hint="write it anew there with `--ckpt-format torch --use-legacy-models`",
        )
    files: dict[tuple[int, int], Path] = {}
    staged = set()
    for path in sorted(where.glob("mp_rank_*")):
        match = _RANK.fullmatch(path.name)
        if match is None:
            raise CheckpointError(
                f"{path} is no rank of the classic layout (mp_rank_TT or mp_rank_TT_PPP): experts, or split optimizers"
            )
        staged.add(match.group(2) is not None)
        files[int(match.group(1)), int(match.group(2) or 0)] = path / RANK_FILE
    if not files:
        raise CheckpointError(f"{where} holds no mp_rank_* folder")
    if len(staged) > 1:
        raise CheckpointError(f"{where} mixes mp_rank_TT and mp_rank_TT_PPP: remains of two checkpoints")
    for stage in range(1 + max(p for _, p in files)):
        for rank in range(1 + max(t for t, _ in files)):
            path = files.get((rank, stage), where / rank_folder(rank, stage, 1 + int(staged == {True})) / RANK_FILE)
            if not path.is_file():
                raise CheckpointError(f"{path} is missing", hint="copy the files of all ranks into one folder")
    return files


def _agreed(
    states: dict[tuple[int, int], Any], files: dict[tuple[int, int], Path], where: Path, tensor: int, pipeline: int
) -> Namespace | None:
    """The args of the first rank, after all ranks were found to be of one checkpoint of this many ranks."""
    first, same = states[0, 0], ("iteration", "checkpoint_version")
    for rank, state in states.items():
        for key in same:
            if state.get(key) != first.get(key):
                raise CheckpointError(
                    f"{files[rank]} is of {key} {state.get(key)}, {files[0, 0]} of {first.get(key)}",
                    hint="files of two checkpoints were mixed: copy all from one",
                )
    match = _ITERATION.fullmatch(where.name)
    numbered = int(match.group(1)) if match and match.group(1) else None
    if numbered is not None and isinstance(first.get("iteration"), int) and first["iteration"] != numbered:
        raise CheckpointError(f"{files[0, 0]} is of iteration {first['iteration']}, its folder is {where.name}")
    args = first.get("args")
    if args is None:
        return None
    if not isinstance(args, Namespace):
        raise CheckpointError(f"{files[0, 0]}: args is no namespace")
    sizes = {
        "tensor": (getattr(args, "tensor_model_parallel_size", getattr(args, "model_parallel_size", None)), tensor),
        "pipeline": (getattr(args, "pipeline_model_parallel_size", None), pipeline),
    }
    for kind, (wanted, found) in sizes.items():
        if wanted is not None and wanted != found:
            raise CheckpointError(
                f"{where} holds {found} {kind} rank{'s' * (found > 1)}; its args say {wanted}",
                hint="copy the files of all ranks into one folder",
            )
    return args


def _version(state: dict[str, Any], path: Path) -> float:
    version = state.get("checkpoint_version", 0)  # the first releases did not write it
    if not isinstance(version, int | float) or float(version) not in VERSIONS:
        known = ", ".join(f"{known:g}" for known in VERSIONS)
        raise CheckpointError(f"{path}: checkpoint_version is {version!r}; known are {known}")
    return float(version)


def _refuse_core(state: dict[str, Any], path: Path) -> None:
    """Refuse a model of Megatron-Core, whose names and norms lie otherwise."""
    names = state.get("model", state.get("model0"))
    if isinstance(names, dict) and any(
        str(name).startswith(("decoder.", "embedding.", "output_layer.")) for name in names
    ):
        raise CheckpointError(
            f"{path} holds a model of Megatron-Core (`decoder.layers`), not the classic layout",
            hint="write it anew there with Megatron's `tools/checkpoint/convert.py --saver legacy`",
        )


def _family(names: set[str], path: Path) -> Family:
    for family in FAMILIES.values():
        if family.recognise(names):
            return family
    kind = "T5" if any(".decoder." in name for name in names) else "BERT"
    raise CheckpointError(f"{path} holds a {kind}; read in this layout: {', '.join(f.name for f in FAMILIES.values())}")


def _merge_stages(
    states: dict[tuple[int, int], Any], files: dict[tuple[int, int], Path], tensor: int, pipeline: int
) -> tuple[dict[str, list[Tensor]], dict[str, list[Path]]]:
    """Tensors of all stages under one numbering of the layers.

    A stage may hold several parts (``model0``, ``model1``: an interleaved schedule): part after part, in each stage
    after stage (``megatron/model/transformer.py``, offset of the layer numbers).
    """
    tensors: dict[str, list[Tensor]] = {}
    paths: dict[str, list[Path]] = {}
    parts = ["model"] if "model" in states[0, 0] else sorted(
        (key for key in states[0, 0] if re.fullmatch(r"model\d+", str(key))), key=lambda key: int(key[5:])
    )  # fmt: skip
    offset = 0
    for part in parts:
        for stage in range(pipeline):
            count: int | None = None
            for rank in range(tensor):
                path = files[rank, stage]
                found = dict(_flat(states[rank, stage].get(part), path))
                if not found:
                    raise CheckpointError(f"{path} holds no `{part}`")
                layers = sorted({int(match.group(1)) for name in found if (match := _LAYER.fullmatch(name))})
                if layers != list(range(len(layers))) or count not in (None, len(layers)):
                    raise CheckpointError(f"{path}: layers {layers} are not those of the other ranks, or not all")
                count = len(layers)
                for name, value in found.items():
                    match = _LAYER.fullmatch(name)
                    full = f"{LAYER}{offset + int(match.group(1))}.{match.group(2)}" if match else name
                    tensors.setdefault(full, []).append(value)
                    paths.setdefault(full, []).append(path)
                    if len(tensors[full]) != rank + 1:
                        raise CheckpointError(f"{path}: tensor {name} is in one rank's file and not in another's")
            offset += count or 0
    for name, slices in tensors.items():
        if len(slices) != tensor:
            lacking = paths[name][0].parent.name.replace("mp_rank_00", f"mp_rank_{len(slices):02d}")
            raise CheckpointError(f"{paths[name][0].parents[1] / lacking / RANK_FILE}: tensor {name} is missing")
    return tensors, paths


def _flat(values: Any, path: Path, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a nested state dict, under canonical names."""
    if not isinstance(values, dict):
        return
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            if not IGNORED.fullmatch(name):
                if not value.is_floating_point():
                    raise CheckpointError(f"{path}: tensor {name} has type {value.dtype}, no floating point")
                yield canonical(name), value
        else:
            yield from _flat(value, path, f"{name}.")
