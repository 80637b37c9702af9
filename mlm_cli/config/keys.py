"""The dotted keys of the schema: what they are, which hold paths, and which one a mistyped key meant."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel

from mlm_cli.config.schema import Recipe

# Keys that hold files, folders or prefixes. Those of the second kind may also hold a name (Hub, `bytes`, `auto`) and
# are made absolute only if something by that name is there.
PATH_KEYS = (
    *("output", "data.path", "data.train", "data.valid", "data.test", "task.train", "task.dev", "evaluate.data"),
    *("parallel.offload_folder", "preprocess.clean.decontaminate", "retrieval.documents", "retrieval.index"),
)
PATH_OR_NAME_KEYS = ("tokenizer", "init_from", "checkpoint.resume", "preprocess.inputs", "retrieval.embedding_model")

# Never repeated in a message: a user who writes the secret itself there is told so without it.
SECRET_KEYS = ("generate.watermark_key",)

# Sections that are not there unless they are set; `null` takes them away. The others go back to their defaults.
OPTIONAL_SECTIONS = ("task", "rampup", "rotary_scaling", "experts")

# What the same thing is called elsewhere: Megatron-LM, transformers, DeepSpeed, litgpt.
_FOREIGN = {
    "tensor_model_parallel_size": "parallel.tensor",
    "tensor_parallel": "parallel.tensor",
    "tp": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "zero_stage": "parallel.zero",
    "zero_optimization": "parallel.zero",
    "train_iters": "train.steps",
    "max_steps": "train.steps",
    "iterations": "train.steps",
    "per_device_train_batch_size": "train.micro_batch_size",
    "batch_size": "train.micro_batch_size",
    "train_batch_size": "train.global_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "learning_rate": "optimizer.lr",
    "max_lr": "optimizer.lr",
    "lr_warmup_iters": "schedule.warmup_steps",
    "warmup": "schedule.warmup_steps",
    "lr_decay_style": "schedule.decay",
    "lr_scheduler_type": "schedule.decay",
    "max_grad_norm": "train.clip_grad",
    "gradient_checkpointing": "train.recompute",
    "dtype": "train.precision",
    "bf16": "train.precision",
    "save_interval": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "eval_interval": "evaluate.every",
    "max_position_embeddings": "model.seq_length",
    "block_size": "model.seq_length",
    "n_layer": "model.num_layers",
    "n_embd": "model.hidden_size",
    "n_head": "model.num_attention_heads",
    "num_key_value_heads": "model.num_query_groups",
    "output_dir": "output",
    "save": "output",
}


def written_out(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Recipe values with `model.attention: KERNEL` as the section it stands for: merging keeps its other keys."""
    model = values.get("model")
    if isinstance(model, Mapping) and isinstance(model.get("attention"), str):
        return {**values, "model": {**model, "attention": {"kernel": model["attention"]}}}
    return values


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class inside a field's annotation, if it is one."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


@cache
def all_keys() -> tuple[str, ...]:
    """Every leaf key of the schema, dotted."""
    keys: list[str] = []
    for name, field in Recipe.model_fields.items():
        section = section_of(field.annotation)
        keys += [f"{name}.{inner}" for inner in _inner_keys(section)] if section else [name]
    return tuple(keys)


def _inner_keys(section: type[BaseModel]) -> list[str]:
    """Keys of a section as a recipe spells them, those of sections inside it with their own after a dot."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        keys.append(field.alias or name)
        keys += [f"{name}.{deeper}" for deeper in _inner_keys(inner)] if inner else []
    return keys


def suggest(key: str) -> str | None:
    """The key of the schema that ``key`` most likely meant, or None."""
    section, _, last = key.rpartition(".")
    if last in _FOREIGN:
        return _FOREIGN[last]
    inside = [known for known in all_keys() if known.rpartition(".")[0] == section]
    sections = [name for name, field in Recipe.model_fields.items() if section_of(field.annotation)]
    same_name = sorted((known for known in all_keys() if known.rpartition(".")[2] == last), key=lambda k: k.count("."))
    by_last = {known.rpartition(".")[2]: known for known in all_keys()}
    for candidates in (inside + (sections if not section else []), [*same_name, *all_keys()]):
        close = difflib.get_close_matches(key, candidates, n=1, cutoff=0.75)
        if close:
            return close[0]
        if candidates is not inside and same_name:
            return same_name[0]
    close = difflib.get_close_matches(last, by_last, n=1, cutoff=0.75)
    return by_last[close[0]] if close else None


def describe_keys() -> list[str]:
    """One line a key: name, type, default, what it means."""
    lines: list[str] = []
    for name, field in Recipe.model_fields.items():
        section = section_of(field.annotation)
        if section is None:
            lines.append(_describe(name, field))
            continue
        lines.append(f"\n{name}:  # {(section.__doc__ or '').strip().partition(chr(10))[0]}")
        lines += _describe_section(section, "  ")
    return lines


def _describe_section(section: type[BaseModel], indent: str) -> list[str]:
    lines: list[str] = []
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is None:
            lines.append(indent + _describe(field.alias or name, field))
            continue
        unset = "" if field.default is not None else ", default None"
        about = field.description or (inner.__doc__ or "").strip().partition("\n")[0]
        lines.append(f"{indent}{name}:{unset}  # {about}")
        lines += _describe_section(inner, indent + "  ")
    return lines


def _describe(name: str, field: Any) -> str:
    default = "required" if field.is_required() else f"default {field.default!r}"
    meaning = f"  # {field.description}" if field.description else ""
    return f"{name}: {_kind(field.annotation)}, {default}{meaning}"


def _kind(annotation: Any) -> str:
    """A type in the words of a recipe."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(inner[0])
    if origin is Literal:
        return "|".join(map(str, inner))
    if origin is tuple:
        return f"list of {_kind(inner[0])}"
    if inner:
        return " or ".join(_kind(item) for item in inner if item is not type(None))
    return "mapping" if section_of(annotation) else str(annotation.__name__)
