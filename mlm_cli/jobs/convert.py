"""The body of ``mlm convert``: a model of any layout, written in another whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlm_cli import log
from mlm_cli.checkpoint import hub_write
from mlm_cli.checkpoint.convert_source import Source, open_source
from mlm_cli.checkpoint.folder import check_free_space, fsync_path
from mlm_cli.checkpoint.hub import save_model_folder
from mlm_cli.checkpoint.hub_read import LAYOUTS, head_tensors, read_model_config
from mlm_cli.checkpoint.int8_layers import Int8Layers, count_int8
from mlm_cli.checkpoint.manifest import MANIFEST, Manifest, hash_file, list_files
from mlm_cli.checkpoint.megatron_write import check_layout, save_megatron_folder
from mlm_cli.checkpoint.save import versions
from mlm_cli.checkpoint.weight_files import WeightFiles
from mlm_cli.config.schema import ModelSection
from mlm_cli.config.shapes import hub_layout
from mlm_cli.errors import CheckpointError, UsageError
from mlm_cli.jobs.progress import ByteProgress
from mlm_cli.models.count import count_parameters, layer_counts
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.tasks.registry import task_of
from mlm_cli.tasks.task_folder import load_task_model, prompt_affixes, save_task_model

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LAYOUTS = {"hf": "Hugging Face", "megatron": "Megatron-LM", "mlm": "mlm checkpoint"}
_WHERE_WEIGHTS_ARE = {"hf": ".", "mlm": "model"}


@dataclass(frozen=True)
class ConvertRequest:
    """What `mlm convert` was asked for; ``tensor``, ``pipeline``, ``checkpoint_version`` are for ``megatron``."""

    source: str
    target: str
    to: str
    dtype: str = "auto"
    tensor: int = 1
    pipeline: int = 1
    checkpoint_version: float = 3.0
    from_pickle: bool = False
    tokenizer: str | None = None
    model_keys: tuple[tuple[str, Any], ...] = ()


def plan(request: ConvertRequest) -> dict[str, Any]:
    """What ``run`` would do, found out without reading the weights and without writing anything.

    Raises:
        UsageError: ``target`` is taken, or its layout cannot hold this model.
        CheckpointError, DataError: a source or tokenizer that cannot be used.
    """
    _check_target(request)
    with open_source_of(request, None) as source:
        return _describe(request, source, _form(request, source))


def run(request: ConvertRequest) -> dict[str, Any]:
    """Convert. Nothing appears under the target's name before all of it is written. Returns a report of plain values.

    Raises:
        UsageError: ``target`` is taken, or its layout cannot hold this model.
        CheckpointError, DataError: a source or tokenizer that cannot be used, or is damaged.
        ResourceError: out of disk space.
    """
    begun, target = time.monotonic(), _check_target(request)
    with _scratch(target) as scratch, open_source_of(request, scratch) as source:
        form = _form(request, source)
        report = _describe(request, source, form)
        floats = report["parameters"] * form.dtype.itemsize
        of_int8 = count_int8(source.section) * (form.dtype.itemsize - 1) if form.is_int8 or source.is_int8 else 0
        written = floats - of_int8 * form.is_int8
        check_free_space(target.parent, written * (2 if request.from_pickle else 1), f"{target}")
        building = scratch / "built"
        building.mkdir()
        with ByteProgress("converting", written + floats - of_int8 * form.keeps_int8) as progress:
            report |= _write(request, source, building, form, _counter(progress))
        _sync(building)
        building.chmod(0o755)
        _check_target(request)  # somebody else may have been faster
        building.replace(target)
        fsync_path(target.parent)
        report["files"] = {
            path.relative_to(target).as_posix(): path.stat().st_size
            for path in sorted(target.rglob("*"))
            if path.is_file()
        }
    return report | {"seconds": time.monotonic() - begun}


def open_source_of(request: ConvertRequest, scratch: Path | None) -> AbstractContextManager[Source]:
    """The source that a request names; see ``checkpoint.convert_source``."""
    return open_source(
        request.source,
        scratch,
        from_pickle=request.from_pickle,
        tokenizer=request.tokenizer,
        given=dict(request.model_keys),
    )


def _check_target(request: ConvertRequest) -> Path:
    target = Path(request.target).expanduser().absolute()
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise UsageError(f"`{request.target}` exists already", hint="name a folder that does not exist yet")
    return target


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """A hidden folder beside the target, so that what is built in it can be moved by its name; gone at the end."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UsageError(f"`{target}` cannot be made: {error.strerror}", hint="choose another DST") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class _Form:
    """Types of the weights in the target.

    Attributes:
        dtype: of all that is not int8.
        makes_int8: the matrices of the layers become int8.
        keeps_int8: those that are int8 in the source stay as they are.
    """

    dtype: torch.dtype
    makes_int8: bool = False
    keeps_int8: bool = False

    @property
    def is_int8(self) -> bool:
        return self.makes_int8 or self.keeps_int8


def _form(request: ConvertRequest, source: Source) -> _Form:
    """``auto``: as in the source, float32 where it does not say."""
    stored = _STORED.get(source.dtype, torch.float32)
    if request.dtype in _DTYPES:
        return _Form(_DTYPES[request.dtype])
    return _Form(stored, makes_int8=request.dtype == "int8", keeps_int8=source.is_int8)


def _describe(request: ConvertRequest, source: Source, form: _Form) -> dict[str, Any]:
    """The report's part that is known beforehand; what the target cannot hold is refused here."""
    section = source.section
    is_task = source.is_task
    architecture: str | None = None
    if request.to == "hf":
        hub_write.refuse_inexpressible(section, int8=form.is_int8)
    if form.is_int8:
        _check_int8(request, source)
    if request.to == "megatron":
        if is_task:
            raise UsageError(
                f"{request.source} was fine-tuned to a task: Megatron's classic layout has no place for its head",
                hint="`--to hf` keeps it",
            )
        check_layout(section, tensor=request.tensor, pipeline=request.pipeline, version=request.checkpoint_version)
    else:
        layout = Int8Layers.layout_of(section) if form.is_int8 else hub_layout(section)
        architecture = source.task_architecture or LAYOUTS[layout].architecture(section)
    exact = section.model_copy(update={"make_vocab_size_divisible_by": 1})
    return {
        "source": str(source.shown),
        "source_layout": source.layout,
        "target": request.target,
        "to": request.to,
        "architecture": architecture,
        "task": is_task,
        "dtype": "int8" if form.is_int8 else str(form.dtype).removeprefix("torch."),
        "parameters": _task_parameters(source, exact) if is_task else count_parameters(exact),
        "vocab_size": section.vocab_size,
        "tokenizer": source.tokenizer.fingerprint if source.tokenizer is not None else None,
        "step": source.step,
        **(
            {
                "tensor": request.tensor,
                "pipeline": request.pipeline,
                "checkpoint_version": request.checkpoint_version,
            }
            if request.to == "megatron"
            else {}
        ),
    }


def _check_int8(request: ConvertRequest, source: Source) -> None:
    """Raise where int8 has no place in the target.

    Raises:
        UsageError: saying what to do instead.
    """
    floats = "`--dtype bf16` or fp32 writes the weights that int8 stands for"
    if request.to == "megatron":
        raise UsageError("Megatron's classic layout has no place for int8 weights", hint=floats)
    if source.is_task and Int8Layers.layout_of(source.section) != hub_layout(source.section):
        raise UsageError(
            f"{request.source} was fine-tuned to a task, and int8 of this architecture is for language models only",
            hint=floats,
        )


def _task_parameters(source: Source, section: ModelSection) -> int:
    """Parameters of a model with a task's head in place of its own; ``section`` without padding rows."""
    _, config = read_model_config(source.folder)
    with WeightFiles(source.folder) as files:
        head = sum(files.numel(name) for name in head_tensors(config, files))
    return head + sum(layer.held(1) for layer in layer_counts(section) if layer.name != "head")


def _write(
    request: ConvertRequest, source: Source, building: Path, form: _Form, on_bytes: Callable[[int], None]
) -> dict[str, Any]:
    """Read the weights and write them; returns what the report gains by it."""
    one = ParallelContext.single()
    if source.tokenizer is None:
        log.warn(f"no tokenizer beside {request.source}: none is written (name one with --tokenizer)")
    if request.to == "megatron" and source.megatron is None:
        prefix, suffix = prompt_affixes(read_model_config(source.folder)[1], source.section.family)
        if prefix or suffix:
            log.warn(
                f"files of Megatron-LM have no place for the prefix {prefix!r} and the suffix {suffix!r} that the "
                "model learned its task with: give them with each prompt"
            )
    meta = {"name": Path(request.target).name, "converted from": request.source, "steps": source.step}
    inner = building / _WHERE_WEIGHTS_ARE.get(request.to, ".")
    if source.is_task:
        if source.tokenizer is None:
            raise CheckpointError(
                f"{request.source} was fine-tuned to a task and has no tokenizer", hint="name one with --tokenizer"
            )
        task = task_of(source.folder, source.tokenizer)
        tuned = load_task_model(source.folder, one, task.head, dtype=form.dtype, keep_int8=form.keeps_int8)
        save_task_model(tuned, task, inner, meta=meta, int8=form.makes_int8)
    elif request.to == "megatron":
        command = save_megatron_folder(
            source.load(one, form.dtype, on_bytes),
            building,
            source.tokenizer,
            tensor=request.tensor,
            pipeline=request.pipeline,
            version=request.checkpoint_version,
            iteration=source.step,
            on_bytes=on_bytes,
        )
        return {"megatron_options": command}
    else:
        model = source.load(one, form.dtype, on_bytes, keep_int8=form.keeps_int8)
        save_model_folder(model, inner, source.tokenizer, meta=meta, int8=form.makes_int8, on_bytes=on_bytes)
    source.carry_along(inner)
    if request.to == "mlm":
        _write_manifest(building, source.step)
    return {}


def _write_manifest(building: Path, step: int | None) -> None:
    """A checkpoint's manifest, of a checkpoint that no training run of ours took."""
    manifest = Manifest(
        step=step or 0,
        consumed_samples=0,
        recipe_hash="",
        data_fingerprint=None,
        layout={"world": 1, "tensor": 1, "data": 1, "pipeline": 1},
        files={name: hash_file(building / name) for name in list_files(building)},
        versions=versions(),
    )
    (building / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _sync(folder: Path) -> None:
    """Everything below ``folder`` on the disk: the name it gets stands for whole files, after a power cut too."""
    for path in [*folder.rglob("*"), folder]:
        fsync_path(path)
        if path.is_dir() and path != folder:
            path.chmod(0o755)


def _counter(progress: ByteProgress) -> Callable[[int], None]:
    done = 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress.update(done)

    return count


def report_text(report: dict[str, Any]) -> str:
    """The report for people."""
    layout = _LAYOUTS[report["to"]]
    if report["to"] == "megatron":
        layout += (
            f", {report['tensor']} tensor x {report['pipeline']} pipeline, version {report['checkpoint_version']:g}"
        )
    elif report["architecture"]:
        layout += f" ({report['architecture']})"
    done = "seconds" in report
    size = sum(report.get("files", {}).values())
    lines = [
        f"{report['target']}: {layout}, {report['parameters']:,} parameters, {report['dtype']}, "
        f"{report['vocab_size']:,} tokens" + ("" if done else " (dry run: nothing was written)"),
    ]
    if done:
        lines.append(f"{len(report['files'])} files, {size / 1e6:,.1f} MB, {report['seconds']:.1f} s")
    if report.get("megatron_options"):
        lines += ["Megatron-LM needs these options beside --load:", "  " + " ".join(report["megatron_options"])]
    return "\n".join(lines)
