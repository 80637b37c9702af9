"""Ranks and batches that follow from recipe keys and the number of processes."""

from __future__ import annotations

from dataclasses import dataclass

from mlm_cli.config.schema import RampupSection, Recipe


@dataclass(frozen=True)
class Batch:
    """How a global batch is made: ``global = micro x data_size x accumulation``."""

    data_parallel_size: int
    micro_batch_size: int
    global_batch_size: int
    gradient_accumulation_steps: int


def global_batch_at(consumed_samples: int, whole: int, rampup: RampupSection | None) -> int:
    """Samples of the step that begins after ``consumed_samples``: a pure function, so that a resume needs nothing more.

    From ``start`` to ``whole`` in stages of ``increment``, each for an even share of ``rampup.samples`` (Megatron-LM,
    ``core/num_microbatches_calculator.py``, ``RampupBatchsizeNumMicroBatchesCalculator``).
    """
    if rampup is None or consumed_samples > rampup.samples or rampup.start >= whole:
        return whole
    stages = (whole - rampup.start) // rampup.increment
    return min(whole, rampup.start + consumed_samples * stages // rampup.samples * rampup.increment)


def samples_of(steps: int, whole: int, rampup: RampupSection | None) -> int:
    """Samples of the first ``steps`` steps."""
    step = samples = 0
    while step < steps and global_batch_at(samples, whole, rampup) < whole:
        samples += global_batch_at(samples, whole, rampup)
        step += 1
    return samples + (steps - step) * whole


def model_parallel_size(recipe: Recipe) -> int:
    """Ranks that work on one sample: slices, stages, and shares of its tokens."""
    return recipe.parallel.tensor * recipe.parallel.pipeline * recipe.parallel.context


def batch_arithmetic(recipe: Recipe, world_size: int) -> Batch:
    """The batch of a recipe that ``checks.check`` has passed."""
    data = world_size // model_parallel_size(recipe)
    micro = recipe.train.micro_batch_size
    whole = recipe.train.global_batch_size or micro * data
    return Batch(data, micro, whole, whole // (micro * data))
