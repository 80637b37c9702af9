"""What a recipe asks of a machine: ranks, batches, parameters, FLOPs, memory and time. Starts nothing, needs no GPU."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mlm_cli.config.derived import Batch, batch_arithmetic, samples_of
from mlm_cli.config.schema import Recipe
from mlm_cli.config.shapes import padded_vocab_size, sample_tokens
from mlm_cli.errors import UsageError
from mlm_cli.launch import memory
from mlm_cli.models.count import FLOPS_FORMULA, count_parameters, flops_per_token, parameter_parts

ZERO_CUTS = ("optimizer", "gradients", "weights")  # what ZeRO 1, 2 and 3 share out over the data ranks


@dataclass(frozen=True)
class Plan:
    """Everything ``mlm plan`` says. Times are None when the device's speed was not given."""

    world_size: int
    tensor: int
    pipeline: int
    context: int
    zero: int
    batch: Batch
    parameters: int
    parameters_by_part: dict[str, int]
    parameters_per_rank: int
    vocab_size: int
    padded_vocab_size: int
    precision: str
    seq_length: int
    steps: int
    rampup: dict[str, int] | None
    tokens_per_step: int
    tokens: int
    flops_per_token: float
    flops: float
    memory: memory.Memory
    device_tflops: float | None
    mfu: float
    seconds: float | None
    seconds_per_step: float | None

    def to_dict(self) -> dict[str, Any]:
        """One JSON document; sizes in bytes, times in seconds."""
        values = asdict(self)
        values["memory"].update(total=self.memory.total, host=self.memory.host)
        values["formulas"] = {"flops": FLOPS_FORMULA, "activations": memory.ACTIVATIONS_FORMULA}
        return values


def make_plan(recipe: Recipe, world_size: int, *, device_tflops: float | None = None, mfu: float = 0.4) -> Plan:
    """Plan a recipe that has passed ``checks.check`` for this many ranks.

    Args:
        recipe: its vocabulary is taken from ``model.vocab_size``, else from the tokenizer.
        world_size: number of ranks.
        device_tflops: peak rate of one rank's device in TFLOP/s at the recipe's precision; gives times.
        mfu: share of that peak that training reaches.

    Raises:
        UsageError: neither a vocabulary size nor a tokenizer.
    """
    recipe = with_vocabulary(recipe)
    model, batch = recipe.model, batch_arithmetic(recipe, world_size)
    tokens_per_step = batch.global_batch_size * sample_tokens(model)
    per_token = flops_per_token(model, masked_share=recipe.data.masking.probability)
    tokens = samples_of(recipe.train.steps, batch.global_batch_size, recipe.train.rampup) * sample_tokens(model)
    rate = None if device_tflops is None else world_size * device_tflops * 1e12 * mfu
    return Plan(
        world_size=world_size,
        tensor=recipe.parallel.tensor,
        pipeline=recipe.parallel.pipeline,
        context=recipe.parallel.context,
        zero=recipe.parallel.zero,
        batch=batch,
        parameters=count_parameters(model),
        parameters_by_part=parameter_parts(model),
        parameters_per_rank=memory.parameters_per_rank(model, recipe.parallel.tensor, recipe.parallel.pipeline),
        vocab_size=model.vocab_size or 0,
        padded_vocab_size=padded_vocab_size(model),
        precision=recipe.train.precision,
        seq_length=model.seq_length,
        steps=recipe.train.steps,
        rampup=None if recipe.train.rampup is None else recipe.train.rampup.model_dump(),
        tokens_per_step=tokens_per_step,
        tokens=tokens,
        flops_per_token=per_token,
        flops=per_token * tokens,
        memory=memory.estimate(
            recipe, data_parallel_size=batch.data_parallel_size, accumulate=batch.gradient_accumulation_steps > 1
        ),
        device_tflops=device_tflops,
        mfu=mfu,
        seconds=None if rate is None else per_token * tokens / rate,
        seconds_per_step=None if rate is None else per_token * tokens_per_step / rate,
    )


def with_vocabulary(recipe: Recipe) -> Recipe:
    """The recipe with ``model.vocab_size`` filled in from its tokenizer, and T5's targets from their spans."""
    if recipe.model.family == "t5":
        from mlm_cli.data.span_corruption import with_targets

        model = with_targets(recipe.model, recipe.data.span_corruption)
        recipe = recipe.model_copy(update={"model": model})
    if recipe.model.vocab_size is not None:
        return recipe
    if recipe.tokenizer is None:
        raise UsageError(
            "the size of the vocabulary is not known: neither `model.vocab_size` nor `tokenizer` is set",
            hint="add `model.vocab_size=50257` or `tokenizer=PATH_OR_NAME`",
        )
    from mlm_cli.data.tokenizer import load_tokenizer

    size = load_tokenizer(recipe.tokenizer).vocab_size
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"vocab_size": size})})


def as_text(plan: Plan) -> str:
    """The plan as a table for people."""
    batch, rows = plan.batch, list[tuple[str, str]]()
    rows.append(
        (
            "ranks",
            f"{plan.world_size} = tensor {plan.tensor} x pipeline {plan.pipeline}"
            + (f" x context {plan.context}" if plan.context > 1 else "")
            + f" x data {batch.data_parallel_size}",
        )
    )
    rows.append(
        ("parameters", f"{plan.parameters:,} ({short(plan.parameters)}), {short(plan.parameters_per_rank)} a rank")
    )
    rows += [(f"  {part}", f"{count:,}") for part, count in plan.parameters_by_part.items() if count]
    rows.append(("vocabulary", f"{plan.vocab_size:,}, padded to {plan.padded_vocab_size:,}"))
    rows.append(
        (
            "global batch",
            f"{batch.global_batch_size:,} samples = micro {batch.micro_batch_size} x data {batch.data_parallel_size}"
            f" x accumulation {batch.gradient_accumulation_steps}",
        )
    )
    if plan.rampup is not None:
        grown = "from {start:,} by {increment:,} over the first {samples:,} samples".format(**plan.rampup)
        rows.append(("  ramp-up", grown))
    rows.append(("tokens", f"{plan.tokens_per_step:,} a step, {short(plan.tokens)} in {plan.steps:,} steps"))
    rows.append(("FLOPs", f"{short(plan.flops_per_token)} a token, {plan.flops:.3g} in all ({FLOPS_FORMULA})"))
    held = plan.memory
    beside = f", and {gib(held.host)} of the host's" if held.host else ""
    beside += f", {gib(held.disk)} on a disk" if held.disk else ""
    rows.append(("memory a rank", f"{gib(held.total)} estimated{beside}, precision {plan.precision}"))
    for name in ("weights", "gradients", "optimizer", "activations", "logits"):
        rows.append(
            (
                f"  {name}",
                gib(getattr(held, name))
                + (f" (ZeRO-{plan.zero})" if name in ZERO_CUTS[: plan.zero] else "")
                + _elsewhere(name, held.offload),
            )
        )
    if plan.seconds is None or plan.seconds_per_step is None:
        rows.append(("time", "give `--device-tflops` (peak of one rank's device) for an estimate"))
    else:
        rate = f"{plan.device_tflops:g} TFLOP/s a rank at {plan.mfu:.0%} MFU"
        rows.append(("time", f"{duration(plan.seconds)}, {plan.seconds_per_step:.3g} s a step ({rate})"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _elsewhere(name: str, offload: str) -> str:
    if offload == "none" or name not in ZERO_CUTS:
        return ""
    return " on a disk" if offload == "nvme" and name == "optimizer" else " on the host"


def short(number: float) -> str:
    """``1.213 B`` for 1,213,480,960."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3f} {unit}"
    return f"{number:g}"


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """``3 days 4 h``, ``2 h 10 min``, ``45 s``."""
    if seconds >= 86400:
        return f"{seconds // 86400:.0f} days {seconds % 86400 // 3600:.0f} h"
    if seconds >= 3600:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"
