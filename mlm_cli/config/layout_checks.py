"""Checks of how a run is spread over ranks: context slices, the number of ranks, batches that grow."""

from __future__ import annotations

from collections.abc import Iterator

from mlm_cli.config.derived import model_parallel_size
from mlm_cli.config.mistakes import Mistake
from mlm_cli.config.schema import Recipe
from mlm_cli.config.shapes import num_query_groups

TRAINING_VERBS = ("pretrain", "finetune")


def check_context(recipe: Recipe, verb: str) -> Iterator[Mistake]:
    """Tokens of a sample shared out over ranks, heads dealt to them in attention."""
    model, parallel = recipe.model, recipe.parallel
    if parallel.context == 1:
        return
    if verb == "finetune" or model.family != "gpt":
        what = "fine-tuning, whose texts differ in length" if verb == "finetune" else f"`model.family` {model.family}"
        yield Mistake(
            ("parallel.context", "model.family"),
            f"`parallel.context` is for pretraining gpt, not for {what}",
            "use `parallel.context=1`",
        )
        return
    if model.experts is not None:
        yield Mistake(
            ("parallel.context", "model.experts"),
            "experts count the tokens of whole samples, and `parallel.context` shares these out",
            "use `parallel.context=1`",
        )
    shares = parallel.context * (parallel.tensor if parallel.sequence else 1)
    if model.seq_length % shares:
        yield Mistake(
            ("parallel.context", "model.seq_length"),
            f"`model.seq_length` {model.seq_length} cannot be shared out over {shares} ranks",
            f"use `model.seq_length={model.seq_length // shares * shares or shares}`, or `parallel.context=1`",
        )
    dealt = parallel.tensor * parallel.context
    groups = num_query_groups(model)
    for key, size in (("model.num_attention_heads", model.num_attention_heads), ("model.num_query_groups", groups)):
        if size % dealt and (key != "model.num_query_groups" or groups != model.num_attention_heads):
            fits = max(c for c in range(1, parallel.context) if size % (parallel.tensor * c) == 0 or c == 1)
            yield Mistake(
                ("parallel.context", key, "parallel.tensor"),
                f"`{key}` {size} cannot be dealt to `parallel.tensor` {parallel.tensor} x `parallel.context` "
                f"{parallel.context} = {dealt} ranks: in attention each holds all tokens of some heads",
                f"use `parallel.context={fits}`, or a multiple of {dealt} heads",
            )


def check_layout(recipe: Recipe, verb: str, world_size: int) -> Iterator[Mistake]:
    model_size = model_parallel_size(recipe)
    keys = ("parallel.tensor", "parallel.pipeline", "parallel.context")
    if world_size % model_size:
        if world_size < model_size:
            more = [axis for axis in ("pipeline", "context") if getattr(recipe.parallel, axis) > 1]
            sizes = " x ".join(f"`parallel.{axis}` {getattr(recipe.parallel, axis)}" for axis in ("tensor", *more))
            message = f"{sizes} needs {model_size} ranks, and there is {world_size}"
            smaller = " and ".join(f"`parallel.{axis}=1`" for axis in ("tensor", *more))
            smaller = smaller if more else f"`parallel.tensor={world_size}`"
            hint = f"add `--nproc {model_size}`, or use {smaller}"
        else:
            message = f"{world_size} ranks are not a multiple of the {model_size} that work on one sample"
            fits = world_size // model_size * model_size
            hint = f"use `--nproc {fits}` or `--nproc {fits + model_size}`"
        yield Mistake(keys, message, hint)
        return
    if verb not in (*TRAINING_VERBS, "plan"):
        return
    data, micro, whole = world_size // model_size, recipe.train.micro_batch_size, recipe.train.global_batch_size
    if whole is not None and whole % (micro * data):
        down = max(1, whole // (micro * data)) * micro * data
        yield Mistake(
            ("train.global_batch_size", "train.micro_batch_size"),
            f"`train.global_batch_size` {whole} is not a multiple of micro-batch size {micro} x {data} data ranks",
            f"use `train.global_batch_size={down}`, or another micro-batch size",
        )
    yield from _rampup(recipe, whole or micro * data, micro * data)
    copies = data * recipe.parallel.context
    if recipe.train.engine == "plain" and copies > 1:
        yield Mistake(
            ("train.engine",),
            f"`train.engine` plain does not average gradients, and there are {copies} copies of the model",
            "use `train.engine=auto`",
        )


def _rampup(recipe: Recipe, whole: int, unit: int) -> Iterator[Mistake]:
    """``unit``: samples of one micro-batch over all data ranks."""
    rampup = recipe.train.rampup
    if rampup is None:
        return
    for key, value in (("start", rampup.start), ("increment", rampup.increment)):
        if value % unit:
            yield Mistake(
                (f"train.rampup.{key}", "train.micro_batch_size"),
                f"`train.rampup.{key}` {value} is not a multiple of the {unit} samples of a micro-batch over all ranks",
                f"use `train.rampup.{key}={max(1, value // unit) * unit}`",
            )
    if rampup.start > whole or (whole - rampup.start) % rampup.increment:
        yield Mistake(
            ("train.rampup.start", "train.rampup.increment", "train.global_batch_size"),
            f"`train.rampup` does not go from {rampup.start} to `train.global_batch_size` {whole} in steps of "
            f"{rampup.increment}",
            f"use `train.rampup.start={whole % rampup.increment or min(rampup.increment, whole)}`",
        )


def nearest_divisor(size: int, wanted: int) -> int:
    """The divisor of ``size`` nearest to ``wanted``."""
    divisors = [candidate for candidate in range(1, size + 1) if size % candidate == 0]
    return min(divisors, key=lambda divisor: (abs(divisor - wanted), divisor))
