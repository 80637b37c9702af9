"""What `mlm convert` reads: a model of any known layout, with its tokenizer and the facts that travel with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlm_cli.checkpoint import compressed_tensors, hub_read, megatron_read
from mlm_cli.checkpoint.hub_read import TASK, trained_task
from mlm_cli.checkpoint.hub_write import check_vocabulary
from mlm_cli.checkpoint.manifest import MANIFEST, check_weights, read_manifest
from mlm_cli.checkpoint.megatron_folder import MegatronFiles, is_megatron_folder, open_megatron
from mlm_cli.checkpoint.model_card import restated
from mlm_cli.checkpoint.pickled import repack_pickled
from mlm_cli.checkpoint.resolve import resolve_best
from mlm_cli.checkpoint.weight_files import read_json
from mlm_cli.config.schema import ModelSection
from mlm_cli.config.tasks import WRITTEN_KINDS
from mlm_cli.data.tokenizer import Tokenizer, load_tokenizer
from mlm_cli.errors import UsageError
from mlm_cli.models.model import Model
from mlm_cli.parallel.context import ParallelContext

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "encoder.json", "vocab.txt", "*.model")
_CARD, _GENERATION = "README.md", "generation_config.json"
# Of a config.json: where a decoder begins and what ends a text belong to the weights, whatever the tokenizer says.
_IDS = ("decoder_start_token_id", "eos_token_id")


@dataclass(frozen=True)
class Source:
    """A model found and understood; its weights are still on the disk.

    Attributes:
        shown: the folder, to tell the user.
        folder: where its files are read.
        layout: ``"megatron"``, ``"hf"`` or ``"mlm"`` (the Hugging Face layout as written here).
        dtype: of the weights, as a ``config.json`` names it; where some are int8, of the others.
        is_int8: the matrices of its layers are int8.
        tokenizer: None where there is none.
        step: where in training it was taken; None: not known.
        task_architecture: transformers' class, where it was fine-tuned to a task, whose head it has.
        megatron: the opened files of that layout.
    """

    shown: Path
    folder: Path
    layout: str
    section: ModelSection
    dtype: str
    tokenizer: Tokenizer | None
    step: int | None
    is_int8: bool = False
    task_architecture: str | None = None
    megatron: MegatronFiles | None = None

    @property
    def is_task(self) -> bool:
        """It has a task's head in place of its own."""
        return self.task_architecture is not None

    def load(
        self, parallel: ParallelContext, dtype: torch.dtype, on_bytes: Callable[[int], None], *, keep_int8: bool = False
    ) -> Model:
        """The model in memory; with ``keep_int8`` matrices that are int8 stay so.

        Raises:
            CheckpointError: naming the file and tensor that is missing, left over, of another shape or damaged.
        """
        if self.megatron is not None:
            return megatron_read.load_section(self.megatron, self.section, parallel, dtype=dtype, on_bytes=on_bytes)
        options: dict[str, Any] = {"dtype": dtype, "on_bytes": on_bytes, "keep_int8": keep_int8}
        return hub_read.load_model_folder(self.folder, parallel, **options)[0]

    def carry_along(self, target: Path) -> None:
        """Copy what describes the model and was not made anew: its card (licence, data) and settings of generation."""
        if self.megatron is not None:
            return
        if (self.folder / _GENERATION).is_file() and not self.is_task:
            shutil.copyfile(self.folder / _GENERATION, target / _GENERATION)
        if (self.folder / _CARD).is_file():
            text = (self.folder / _CARD).read_text(encoding="utf-8", errors="replace")
            now = read_json(target / "config.json")
            weights = compressed_tensors.shown(now["dtype"]) if compressed_tensors.KEY in now else now["dtype"]
            text = restated(text, now["architectures"][0], now["model_type"], weights)
            (target / _CARD).write_text(text, encoding="utf-8")
        if not self.is_task:
            self._carry_entries(target / "config.json")

    def _carry_entries(self, target: Path) -> None:
        theirs, ours = read_json(self.folder / "config.json"), read_json(target)
        if TASK in theirs:
            ours[TASK] = theirs[TASK]
        vocabulary = range(self.section.vocab_size or 0)
        for key in _IDS:
            value = theirs.get(key)
            ids = value if isinstance(value, list) else [value]
            if ids and all(type(number) is int and number in vocabulary for number in ids):
                ours[key] = value
        target.write_text(json.dumps(ours, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def open_source(
    spec: str, scratch: Path | None, *, from_pickle: bool, tokenizer: str | None, given: Mapping[str, Any]
) -> Iterator[Source]:
    """Find the model that ``spec`` names.

    Args:
        scratch: a folder for what must be written on the way; None: write nothing, the weights will not be loaded.
        from_pickle: read ``pytorch_model*.bin``, weights only, instead of safetensors.
        tokenizer: instead of the one beside the model.
        given: settings of the model section that files of Megatron-LM lack.

    Raises:
        CheckpointError: no model, damaged, or of an architecture that is not known.
        DataError: a tokenizer that does not load.
        UsageError: options that do not fit this source.
    """
    found = resolve_best(spec)
    if is_megatron_folder(found):
        if from_pickle:
            raise UsageError(
                f"{spec} is of Megatron-LM: its files are read weights only anyway", hint="leave out --from-pickle"
            )
        yield _megatron(found, tokenizer, given)
        return
    if given:
        raise UsageError(
            f"model.{next(iter(given))} is known from {found / 'config.json'}",
            hint="model.* keys are for files of Megatron-LM",
        )
    if scratch is not None:
        check_weights(found)  # else the copy's own manifest would vouch for the damage
    folder = _repacked(found, scratch) if from_pickle and scratch is not None else found
    section, config = hub_read.read_model_config(folder)
    words = _tokenizer(tokenizer, found)
    if words is not None:
        check_vocabulary(section, words, spec)
    is_task = hub_read.task_class(config) is not None or trained_task(config) not in (None, *WRITTEN_KINDS)
    dtype = config.values.get("dtype") or config.values.get("torch_dtype")
    yield Source(
        shown=found,
        folder=folder,
        layout="mlm" if "mlm" in config.values else "hf",
        section=section,
        dtype=str(dtype),
        tokenizer=words,
        step=read_manifest(found.parent).step if (found.parent / MANIFEST).is_file() else None,
        is_int8=compressed_tensors.is_quantized(config),
        task_architecture=str(config.get("architectures", list)[0]) if is_task else None,
    )


def _megatron(found: Path, tokenizer: str | None, given: Mapping[str, Any]) -> Source:
    files = open_megatron(found)
    place = found if any(any(found.glob(name)) for name in _TOKENIZER_FILES) else found.absolute().parent
    words = _tokenizer(tokenizer, place if files.folder.absolute() == found.absolute() else found)
    size = words.vocab_size if words is not None and tokenizer is not None else None
    section = megatron_read.read_section(files, found, given, vocab_size=size)
    if words is not None:
        check_vocabulary(section, words, str(found))
    return Source(
        shown=found,
        folder=found,
        layout="megatron",
        section=section,
        dtype=megatron_read.dtype_name(files),
        tokenizer=words,
        step=files.iteration,
        megatron=files,
    )


def _tokenizer(spec: str | None, folder: Path) -> Tokenizer | None:
    if spec is not None:
        return load_tokenizer(spec)
    there = any(any(folder.glob(name)) for name in _TOKENIZER_FILES)
    return load_tokenizer(str(folder)) if there else None


def _repacked(folder: Path, scratch: Path) -> Path:
    """The folder once more, with its pickled weights as safetensors."""
    staged = scratch / "unpickled"
    staged.mkdir()
    repack_pickled(folder, staged)
    for path in folder.iterdir():
        if (
            path.is_file()
            and path.suffix in (".json", ".txt", ".model", ".md")
            and not path.name.endswith("index.json")
        ):
            shutil.copyfile(path, staged / path.name)
    return staged
