"""Checks of the model section that its shapes do not decide: what a family has no use for, what excludes what."""

from __future__ import annotations

from collections.abc import Iterator

from mlm_cli.config.mistakes import Mistake
from mlm_cli.config.schema import ModelSection, Recipe
from mlm_cli.config.shapes import crossed_ramp, decoder_seq_length, is_sparse
from mlm_cli.config.tasks import WRITTEN_KINDS

# keys of the model section that one family alone understands, and what they are when nobody has set them
_OF_ONE_FAMILY = {
    "t5": ("num_decoder_layers", "decoder_seq_length", "relative_buckets", "relative_max_distance"),
    "bert": ("num_token_types", "binary_head"),
}
_POSITIONS = {"gpt": ("learned", "rotary"), "bert": ("learned",), "t5": ("relative",)}


def check_model(recipe: Recipe) -> Iterator[Mistake]:
    """Mistakes of a recipe that is to be trained; what its family has no use for is said, rather than passed over."""
    model = recipe.model
    for family, keys in _OF_ONE_FAMILY.items():
        for key in keys:
            default = ModelSection.model_fields[key].default
            if family != model.family and getattr(model, key) != default:
                yield Mistake(
                    (f"model.{key}", "model.family"),
                    f"`model.{key}` is for `model.family` {family}, not {model.family}",
                    f"leave `model.{key}` out, or use `model.family={family}`",
                )
    known = _POSITIONS[model.family]
    if model.position not in known:
        yield Mistake(
            ("model.position", "model.family"),
            f"`model.family` {model.family} has {' or '.join(known)} positions, not {model.position}",
            f"use `model.position={known[0]}`",
        )
    yield from _attention(model)
    yield from _experts(model)
    if model.family == "t5":
        yield from _t5(recipe)


def check_contrast(recipe: Recipe) -> Iterator[Mistake]:
    """Where the contrastive loss has no meaning, or not the tokens it compares."""
    if not recipe.train.contrastive_margin:
        return
    written = " or ".join(WRITTEN_KINDS)
    if recipe.task is not None and recipe.task.name not in WRITTEN_KINDS:
        yield Mistake(
            ("train.contrastive_margin", "task.name"),
            f"`train.contrastive_margin` is for models that write, and `task.name` {recipe.task.name} writes nothing",
            f"leave it out, or use `task.name` {written}",
        )
    elif recipe.task is None and recipe.model.family == "bert":
        yield Mistake(
            ("train.contrastive_margin", "model.family"),
            "`train.contrastive_margin` is for models that write, and `model.family` bert fills gaps",
            "leave it out, or use `model.family` gpt or t5",
        )
    if recipe.parallel.context > 1:
        yield Mistake(
            ("train.contrastive_margin", "parallel.context"),
            "`train.contrastive_margin` compares all tokens of a text, and `parallel.context` shares these out",
            "use `parallel.context=1`",
        )


def _t5(recipe: Recipe) -> Iterator[Mistake]:
    model, tensor = recipe.model, recipe.parallel.tensor
    if model.init_std != ModelSection.model_fields["init_std"].default:
        yield Mistake(
            ("model.init_std", "model.family"),
            f"`model.init_std` {model.init_std:g} has no effect: T5's initial weights follow from its sizes",
            "leave `model.init_std` out",
        )
    if model.relative_buckets % 4:
        yield Mistake(
            ("model.relative_buckets",),
            f"`model.relative_buckets` {model.relative_buckets} cannot be halved twice (earlier or later, near or far)",
            f"use `model.relative_buckets={model.relative_buckets // 4 * 4}`",
        )
    if model.relative_max_distance <= model.relative_buckets // 2:
        yield Mistake(
            ("model.relative_max_distance", "model.relative_buckets"),
            f"`model.relative_max_distance` {model.relative_max_distance} leaves the buckets of far distances empty",
            f"use `model.relative_max_distance={4 * model.relative_buckets}`",
        )
    targets = model.decoder_seq_length
    if recipe.parallel.sequence and (targets is None or targets % tensor):
        fits = -(-decoder_seq_length(model) // tensor) * tensor
        yield Mistake(
            ("parallel.sequence", "model.decoder_seq_length", "parallel.tensor"),
            f"`parallel.sequence` needs a `model.decoder_seq_length` that is a multiple of `parallel.tensor` {tensor}",
            f"use `model.decoder_seq_length={fits}`, or `parallel.sequence=false`",
        )


def _attention(model: ModelSection) -> Iterator[Mistake]:
    sparse = model.attention
    if is_sparse(model) and model.family == "t5":
        yield Mistake(
            ("model.attention.pattern", "model.family"),
            f"`model.attention.pattern` {sparse.pattern} has no place for T5's relative positions",
            "use `model.attention.pattern=dense`",
        )
    if is_sparse(model) and sparse.kernel == "auto" and model.attention_dropout > 0:
        yield Mistake(
            ("model.attention_dropout", "model.attention.pattern"),
            f"`model.attention.pattern` {sparse.pattern} has no dropout of its probabilities",
            "use `model.attention_dropout=0`",
        )
    if sparse.pattern in ("strided", "fixed") and sparse.window % sparse.block:
        yield Mistake(
            ("model.attention.window", "model.attention.block"),
            f"`model.attention.window` {sparse.window} is not a multiple of `model.attention.block` {sparse.block},"
            f" which {sparse.pattern} needs",
            f"use `model.attention.window={max(1, sparse.window // sparse.block) * sparse.block}`",
        )
    if model.rotary_scaling is not None and model.position != "rotary":
        yield Mistake(
            ("model.rotary_scaling", "model.position"),
            f"`model.rotary_scaling` scales rotary positions, and `model.position` is {model.position}",
            "use `model.rotary_scaling=null`",
        )
    if model.rotary_scaling is not None and (crossed := crossed_ramp(model.rotary_scaling)) is not None:
        fast, slow = crossed
        high, low = getattr(model.rotary_scaling, fast), getattr(model.rotary_scaling, slow)
        yield Mistake(
            (f"model.rotary_scaling.{fast}", f"model.rotary_scaling.{slow}"),
            f"`model.rotary_scaling.{fast}` {high:g} must be above `{slow}` {low:g}",
            "leave both out",
        )


def _experts(model: ModelSection) -> Iterator[Mistake]:
    if model.experts is None:
        return
    if model.family != "gpt":
        yield Mistake(
            ("model.experts", "model.family"),
            f"`model.experts` are for decoders (`model.family` gpt), not for {model.family}",
            "use `model.experts=null`",
        )
    elif model.experts.every > model.num_layers:
        yield Mistake(
            ("model.experts.every", "model.num_layers"),
            f"`model.experts.every` {model.experts.every} gives none of the {model.num_layers} layers experts",
            f"use `model.experts.every={min(2, model.num_layers)}`",
        )
