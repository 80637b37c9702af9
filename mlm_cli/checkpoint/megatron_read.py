"""Reading a model in Megatron-LM's classic layout: whatever ranks wrote it, into whatever slices this rank holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlm_cli import log
from mlm_cli.checkpoint.key_map import ConfigReader
from mlm_cli.checkpoint.megatron_args import bert_settings, build_section, has_two_gelus, settings_of
from mlm_cli.checkpoint.megatron_folder import MegatronFiles, open_megatron
from mlm_cli.checkpoint.megatron_keys import TOKEN_TYPES, WORDS, RowOrder, is_qkv
from mlm_cli.config.schema import ModelSection
from mlm_cli.config.shapes import check_slices, ffn_hidden_size, num_query_groups
from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.errors import CheckpointError, DataError
from mlm_cli.models.model import Model
from mlm_cli.models.registry import build_model
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.shard import Shard, assemble, full_shape, shard_of, slice_full

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def read_model_config(folder: Path) -> tuple[ModelSection, ConfigReader]:
    """The model section of a checkpoint, and entries like those of a ``config.json`` (``architectures``, ``dtype``).

    Raises:
        CheckpointError: see ``open_megatron`` and ``read_section``.
    """
    files = open_megatron(folder)
    section = read_section(files, folder)
    values = {"architectures": [f"Megatron-LM {files.family.name}"], "dtype": dtype_name(files)}
    return section, ConfigReader(values, str(files.main))


def dtype_name(files: MegatronFiles) -> str:
    """Type of the weights, as a ``config.json`` names it."""
    return _NAMES.get(files.tensors[WORDS][0].dtype, "float32")


def read_section(
    files: MegatronFiles, folder: Path, given: Mapping[str, Any] | None = None, *, vocab_size: int | None = None
) -> ModelSection:
    """The model section: from the args in the files, and what ``given`` says otherwise.

    Megatron pads the vocabulary and keeps no record of its true size: it is ``vocab_size`` (a tokenizer's) or
    ``given``, else what ``mlm`` noted when it wrote the files, else that of the tokenizer in ``folder``.

    Raises:
        CheckpointError: an option we do not compute, sizes that contradict the tensors, or an unknown vocabulary.
    """
    given = dict(given or {})
    if WORDS not in files.tensors:
        raise CheckpointError(f"{files.main}: tensor {WORDS} is missing")
    if files.args is not None:
        settings = settings_of(files.args, str(files.main))
    elif "num_attention_heads" in given:
        settings = _measured(files)
    else:
        raise CheckpointError(
            f"{files.main} has no args: the number of attention heads is unknown",
            hint=f"`mlm convert {folder} NEW --to mlm model.num_attention_heads=N`",
        )
    if files.family.name == "BERT":
        shapes = {name: tuple(parts[0].shape) for name, parts in files.tensors.items()}
        settings = bert_settings(settings, shapes, files.args, str(files.main))
    known = given.get("vocab_size") or _vocabulary(files, folder, vocab_size)
    section = build_section(settings, {**given, "vocab_size": known}, str(files.main))
    sizes = {"heads": section.num_attention_heads, "query groups": num_query_groups(section)}
    for what, size in {**sizes, "feed-forward rows": ffn_hidden_size(section)}.items():
        if size % files.tensor:
            raise CheckpointError(f"{files.folder} has {files.tensor} tensor ranks, which cannot share {size} {what}")
    if section.num_layers != files.num_layers:
        raise CheckpointError(f"{files.folder} holds {files.num_layers} layers; its args say {section.num_layers}")
    if files.version < 2 and num_query_groups(section) != section.num_attention_heads:
        raise CheckpointError(f"{files.main}: checkpoint_version {files.version:g} knows no grouped heads")
    return section


def _vocabulary(files: MegatronFiles, folder: Path, tokenizer_size: int | None) -> int:
    """Tokens without padding: as noted in the files, else those of the tokenizer.

    Raises:
        CheckpointError: not known, or a tokenizer with more tokens, or far fewer, than the model has rows.
    """
    rows = sum(part.shape[0] for part in files.tensors[WORDS])
    noted = getattr(files.args, "mlm_vocab_size", None)
    known = tokenizer_size or noted or _beside(folder)
    if known is None:
        raise CheckpointError(
            f"{folder} holds no tokenizer: which of the {rows:,} vocabulary rows are padding is unknown",
            hint=f"`mlm convert {folder} NEW --to mlm --tokenizer TOK` (or model.vocab_size=N)",
        )
    if known > rows:
        raise CheckpointError(
            f"{files.main}: {WORDS} has {rows:,} rows, the vocabulary {known:,} tokens",
            hint="use the tokenizer the model was trained with",
        )
    step = getattr(files.args, "make_vocab_size_divisible_by", None) or 128
    if known != noted and rows - known >= step * files.tensor:
        raise CheckpointError(
            f"{files.main}: {WORDS} has {rows:,} rows, the tokenizer {known:,} tokens; Megatron-LM pads to a multiple "
            f"of {step} x {files.tensor}",
            hint=f"name the tokenizer it was trained with, or say model.vocab_size={known} to cut, {rows} to keep",
        )
    return known


def _measured(files: MegatronFiles) -> dict[str, Any]:
    """What the tensors themselves say, of files from before args were kept: norms and activation are GPT-2's."""
    hidden = files.tensors[WORDS][0].shape[1]
    positions = files.tensors.get("language_model.embedding.position_embeddings.weight")
    up = files.tensors.get("language_model.encoder.layers.0.mlp.dense_h_to_4h.weight")
    if positions is None or up is None:
        raise CheckpointError(f"{files.main} has neither args nor learned positions: its architecture is unknown")
    return {
        "num_layers": files.num_layers,
        "hidden_size": hidden,
        "ffn_hidden_size": sum(part.shape[0] for part in up),
        "seq_length": positions[0].shape[0],
        "bias": "language_model.encoder.layers.0.self_attention.dense.bias" in files.tensors,
        "tie_embeddings": "language_model.output_layer.weight" not in files.tensors,
    }


def _beside(folder: Path) -> int | None:
    """Tokens of the tokenizer in ``folder``, or above an iteration's folder."""
    for place in (folder, folder.absolute().parent):
        if (place / "tokenizer.json").is_file():
            try:
                return load_tokenizer(place).vocab_size
            except DataError as error:
                raise CheckpointError(error.message, hint=error.hint) from None
    return None


def load_model_folder(
    folder: str | Path,
    parallel: ParallelContext,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    head: bool = True,
    changes: Mapping[str, Any] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> tuple[Model, ModelSection]:
    """Build this rank's slice of the model; arguments and errors as ``hub_read.load_model_folder``."""
    files = open_megatron(Path(folder))
    section = read_section(files, Path(folder)).model_copy(update=dict(changes or {}))
    return load_section(files, section, parallel, dtype=dtype, head=head, on_bytes=on_bytes), section


def load_section(
    files: MegatronFiles,
    section: ModelSection,
    parallel: ParallelContext,
    *,
    dtype: torch.dtype,
    head: bool = True,
    on_bytes: Callable[[int], None] | None = None,
) -> Model:
    """Build this rank's slice of ``section`` from opened files; every tensor must fit, and none be left over.

    Args:
        head: False leaves out the output layer, which a task's head stands in place of.
        on_bytes: told the bytes of each tensor read.
    """
    check_slices(section, parallel.tensor.size)
    model = build_model(section, parallel, dtype=dtype, init=False, head=head)
    keys = files.family.keys(section)
    order = RowOrder.of(section, files.tensor, files.version)
    unknown = sorted(set(files.tensors) - set(keys.values()))
    if unknown:
        raise CheckpointError(
            f"{files.file_of(unknown[0])}: unexpected tensor {unknown[0]}", hint="its args do not describe this model"
        )
    if section.family == "bert" and has_two_gelus(files.args):
        log.warn(
            f"{files.folder.name}: Megatron-LM took the exact GELU in the head of masked words and the tanh form in "
            f"the layers (no openai_gelu in its args); here both are model.activation: {section.activation}"
        )
    for name, param in model.named_parameters():
        key = keys[name]
        if key not in files.tensors:
            if _may_lack(files, section, name, key):
                with torch.no_grad():
                    param.zero_()
                continue
            raise CheckpointError(f"{files.file_of(key)}: tensor {key} is missing")
        full = _whole(files, name, key, order, shard_of(param), full_shape(param, parallel.tensor.size))
        with torch.no_grad():
            param.copy_(slice_full(full, shard_of(param), parallel.tensor.rank, parallel.tensor.size))
        if on_bytes is not None:
            on_bytes(sum(part.numel() * part.element_size() for part in files.tensors[key]))
    return model


def _may_lack(files: MegatronFiles, section: ModelSection, name: str, key: str) -> bool:
    """Whether files rightly lack a parameter of ours, which is then zero."""
    if key == TOKEN_TYPES:  # without a binary head Megatron's BERT has none
        return section.binary_head == "none"
    only_qkv = getattr(files.args, "add_qkv_bias", False) and not getattr(files.args, "add_bias_linear", True)
    return bool(only_qkv) and name.endswith(".bias") and "norm" not in name


def _whole(
    files: MegatronFiles, name: str, key: str, order: RowOrder, shard: Shard | None, shape: tuple[int, ...]
) -> Tensor:
    """One parameter from the slices of all ranks: rows in our order, the vocabulary padded as we pad it."""
    parts = files.tensors[key]
    vocabulary = shard is not None and shard.valid is not None
    for part, path in zip(parts, files.paths[key], strict=True):
        wanted = list(shape)
        if shard is not None:
            # as many rows of the vocabulary as each rank has words
            wanted[shard.dim] = len(files.tensors[WORDS][0]) if vocabulary else wanted[shard.dim] // len(parts)
        if list(part.shape) != wanted:
            raise CheckpointError(
                f"{path}: tensor {key} has shape {list(part.shape)}, the model's settings ask for {wanted}"
            )
    if shard is None:
        if any(not part.equal(parts[0]) for part in parts[1:]):
            log.warn(f"{files.folder.name}: {key} differs between tensor ranks; rank 0's is taken")
        return parts[0]
    if is_qkv(name):
        parts = [order.to_ours(part) for part in parts]
    whole = assemble(list(parts), shard)
    if not vocabulary:
        return whole
    assert shard.valid is not None
    if whole.shape[0] < shard.valid:
        raise CheckpointError(
            f"{files.paths[key][0]}: tensor {key} has {whole.shape[0]:,} rows in all ranks, the vocabulary "
            f"{shard.valid:,} tokens"
        )
    padded = whole.new_zeros(shape)
    padded[: shard.valid] = whole[: shard.valid]
    return padded
