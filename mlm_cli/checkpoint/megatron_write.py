"""Writing a model in Megatron-LM's classic layout, for any number of ranks; one rank's file at a time."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlm_cli.checkpoint.megatron_args import arguments_of, command_line, refuse_inexpressible
from mlm_cli.checkpoint.megatron_folder import RANK_FILE, TRACKER, iteration_folder, rank_folder
from mlm_cli.checkpoint.megatron_keys import (
    FAMILIES,
    HEAD_WORDS,
    LAYER,
    NESTED,
    VERSIONS,
    WORDS,
    RowOrder,
    is_qkv,
    old_style,
)
from mlm_cli.config.schema import ModelSection
from mlm_cli.config.shapes import ffn_hidden_size, num_query_groups
from mlm_cli.data.tokenizer import Tokenizer
from mlm_cli.errors import UsageError
from mlm_cli.models.gpt import GPT
from mlm_cli.parallel.shard import shard_of, slice_full

_LAST = (
    "language_model.encoder.final_layernorm.",
    "language_model.output_layer.",
    "language_model.pooler.",
    "lm_head.",
)


def check_layout(model: ModelSection, *, tensor: int, pipeline: int, version: float) -> None:
    """Refuse a layout that Megatron could not have written.

    Raises:
        UsageError: a setting or size that does not fit, and what would.
    """
    refuse_inexpressible(model)
    sizes = {
        "attention heads": model.num_attention_heads,
        "query groups": num_query_groups(model),
        "feed-forward width": ffn_hidden_size(model),
    }
    for what, size in sizes.items():
        if size % tensor:
            fits = max(t for t in range(1, tensor) if all(s % t == 0 for s in sizes.values()))
            raise UsageError(f"{tensor} tensor ranks cannot share {size} {what}", hint=f"use --tensor {fits}")
    if model.num_layers % pipeline:
        fits = max(p for p in range(1, pipeline) if model.num_layers % p == 0)
        raise UsageError(
            f"{model.num_layers} layers cannot fill {pipeline} equal stages", hint=f"use --pipeline {fits}"
        )
    if version not in VERSIONS:
        known = ", ".join(f"{known:g}" for known in VERSIONS)
        raise UsageError(f"checkpoint version {version:g} is unknown", hint=f"known are {known}")
    if version < 3 and pipeline > 1:
        raise UsageError(f"checkpoint version {version:g} has no pipeline stages", hint="use --checkpoint-version 3")
    if version < 2 and num_query_groups(model) != model.num_attention_heads:
        raise UsageError(
            f"checkpoint version {version:g} has no grouped heads ({num_query_groups(model)} for "
            f"{model.num_attention_heads})",
            hint="use --checkpoint-version 3",
        )


def save_megatron_folder(
    model: GPT,
    folder: Path,
    tokenizer: Tokenizer | None = None,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    version: float = 3.0,
    iteration: int | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> list[str]:
    """Write an unsliced ``model``; Megatron's padding of the vocabulary (to ``divisible_by * tensor``) is zeros.

    Args:
        tokenizer: its files go into ``folder``, beside the iteration.
        version: of the layout; below 3 names are those of Megatron-LM v1, which knew no others.
        iteration: where in training the model is; None: written as ``release``.
        on_bytes: told the bytes of each file written.

    Returns:
        the options to start Megatron-LM with.

    Raises:
        UsageError: see ``check_layout``. OSError: from the file system.
    """
    section = model.config
    check_layout(section, tensor=tensor, pipeline=pipeline, version=version)
    where = folder / iteration_folder(iteration)
    dtype = next(model.parameters()).dtype
    args = arguments_of(section, tensor=tensor, pipeline=pipeline, dtype=dtype, iteration=iteration or 0)
    for stage in range(pipeline):
        for rank in range(tensor):
            state = {
                "args": args,
                "checkpoint_version": version,
                "iteration": iteration or 0,
                "model": _nested(
                    _stage(model, rank, stage, args.padded_vocab_size, tensor, pipeline, version), version
                ),
            }
            path = where / rank_folder(rank, stage, pipeline) / RANK_FILE
            path.parent.mkdir(parents=True)
            with path.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            if on_bytes is not None:
                on_bytes(path.stat().st_size)
    if tokenizer is not None:
        tokenizer.save(folder)
    (folder / TRACKER).write_text("release" if iteration is None else str(iteration), encoding="utf-8")
    return command_line(args)


def _stage(
    model: GPT, rank: int, stage: int, padded_vocab: int, tensor: int, pipeline: int, version: float
) -> dict[str, Tensor]:
    """The tensors of one rank under canonical names, layers numbered within the stage."""
    section = model.config
    keys = FAMILIES[section.family].keys(section)
    order = RowOrder.of(section, tensor, version)
    each = section.num_layers // pipeline
    found: dict[str, Tensor] = {}
    for name, param in model.named_parameters():
        key = keys[name]
        if key.startswith(LAYER):
            number, _, rest = key.removeprefix(LAYER).partition(".")
            if int(number) // each != stage:
                continue
            key = f"{LAYER}{int(number) % each}.{rest}"
        elif stage != (pipeline - 1 if key.startswith(_LAST) else 0):
            if key != WORDS or stage != pipeline - 1 or not section.tie_embeddings:
                continue
            key = HEAD_WORDS
        found[key] = _slice(name, param, rank, tensor, padded_vocab, order)
    return found


def _slice(name: str, param: Tensor, rank: int, tensor: int, padded_vocab: int, order: RowOrder) -> Tensor:
    """One rank's part of a parameter, in memory of its own: ``torch.save`` would store all that a view looks into."""
    shard, full = shard_of(param), param.detach().cpu()
    if shard is not None and shard.valid is not None:
        rows = full[: shard.valid]
        full = rows.new_zeros(padded_vocab, *rows.shape[1:])
        full[: shard.valid] = rows
    part = slice_full(full, shard, rank, tensor)
    return (order.to_theirs(part) if is_qkv(name) else part).clone(memory_format=torch.contiguous_format)


def _nested(tensors: dict[str, Tensor], version: float) -> dict[str, Any]:
    """The state dict as Megatron nests it."""
    state: dict[str, Any] = {}
    for name, value in tensors.items():
        prefix = next(prefix for prefix in NESTED if name.startswith(f"{prefix}."))
        rest = name.removeprefix(f"{prefix}.")
        place = state
        *outer, last = (old_style(f"{prefix}.").rstrip(".") if version < 3 else prefix).split(".")
        for part in outer:
            place = place.setdefault(part, {})
        leaf = place.setdefault(last, OrderedDict())
        leaf[old_style(f".{rest}")[1:] if version < 3 else rest] = value
    return state
