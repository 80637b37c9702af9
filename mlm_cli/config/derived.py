"""Numbers that follow from recipe keys: sizes left unset, vocabulary padding, ranks and batches."""

from __future__ import annotations

from dataclasses import dataclass

from mlm_cli.config.schema import ModelSection, Recipe


def padded_vocab_size(vocab_size: int, divisible_by: int) -> int:
    """Rows of the embedding: a multiple of ``make_vocab_size_divisible_by`` that does not depend on the layout."""
    return -(-vocab_size // divisible_by) * divisible_by


def head_dim(model: ModelSection) -> int:
    return model.head_dim or model.hidden_size // model.num_attention_heads


def num_query_groups(model: ModelSection) -> int:
    return model.num_query_groups or model.num_attention_heads


def ffn_hidden_size(model: ModelSection) -> int:
    """4h; for swiglu, whose three matrices should cost as much as two, 8h/3 rounded up to 64 (Shazeer 2020)."""
    if model.ffn_hidden_size is not None:
        return model.ffn_hidden_size
    if model.activation != "swiglu":
        return 4 * model.hidden_size
    return -(-8 * model.hidden_size // (3 * 64)) * 64


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
