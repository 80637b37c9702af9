"""Ranks and batches that follow from recipe keys and the number of processes."""

from __future__ import annotations

from dataclasses import dataclass

from mlm_cli.config.schema import Recipe


@dataclass(frozen=True)
class Batch:
    """How a global batch is made: ``global = micro x data_size x accumulation``."""

    data_parallel_size: int
    micro_batch_size: int
    global_batch_size: int
    gradient_accumulation_steps: int


def model_parallel_size(recipe: Recipe) -> int:
    """Ranks that hold one copy of the model."""
    return recipe.parallel.tensor * recipe.parallel.pipeline


def batch_arithmetic(recipe: Recipe, world_size: int) -> Batch:
    """The batch of a recipe that ``checks.check`` has passed."""
    data = world_size // model_parallel_size(recipe)
    micro = recipe.train.micro_batch_size
    whole = recipe.train.global_batch_size or micro * data
    return Batch(data, micro, whole, whole // (micro * data))
