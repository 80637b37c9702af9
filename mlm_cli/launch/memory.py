"""An estimate of what one rank holds while training, in bytes, each part with its formula."""

from __future__ import annotations

from dataclasses import dataclass

from mlm_cli.config.schema import ModelSection, Recipe
from mlm_cli.config.shapes import ffn_hidden_size, head_dim, is_gated, num_query_groups, padded_vocab_size
from mlm_cli.models.count import layer_counts
from mlm_cli.models.stages import balance, layer_costs

ACTIVATIONS_FORMULA = "Korthikanti et al. 2022, table 2, without the attention matrix (fused attention)"
LOSS_CHUNK_TOKENS = 1024  # tokens whose logits exist at a time, about


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def parameters_per_rank(model: ModelSection, tensor: int, pipeline: int = 1) -> int:
    """Of the rank that holds most. A stage whose output layer is tied to words of another one holds a copy of them."""
    layers = layer_counts(model)

    def held(part: range) -> int:
        copies = sum(layers[number].tied // tensor for number in part if 0 not in part)
        return sum(layers[number].held(tensor) for number in part) + copies

    return max(held(part) for part in balance([layer.cost for layer in layers], pipeline))


def estimate(recipe: Recipe, *, data_parallel_size: int, accumulate: bool) -> Memory:
    """What a rank of this recipe holds.

    Args:
        recipe: with ``model.vocab_size`` set.
        data_parallel_size: ranks that share the optimizer state under ZeRO.
        accumulate: gradients of several micro-batches are summed.

    bf16 counts 2 bytes a weight, and fp32 master, momentum and variance (12 bytes) divided by the data-parallel size
    under ZeRO-1; gradients are fp32 while they accumulate. fp32 counts 4, 4 and 8 bytes. ZeRO-2 divides the gradients
    too, ZeRO-3 the weights (Rajbhandari et al. 2020, figure 1).
    """
    model, tensor = recipe.model, recipe.parallel.tensor
    half = recipe.train.precision != "fp32"
    pipeline = recipe.parallel.pipeline
    params = parameters_per_rank(model, tensor, pipeline)
    copies = data_parallel_size * recipe.parallel.context
    shards, grad_shards, weight_shards = (copies if recipe.parallel.zero >= stage else 1 for stage in (1, 2, 3))
    width = 2 if half else 4
    tokens = recipe.train.micro_batch_size * model.seq_length // recipe.parallel.context
    outer = tensor if recipe.parallel.sequence else 1
    activations = _activations(model, tensor, outer, tokens, width, full_recompute=recipe.train.recompute == "full")
    if pipeline > 1:
        # The first stage keeps a micro-batch for every stage behind it (Narayanan et al. 2021, section 2.2).
        layers = max(len(part) for part in balance(layer_costs(model), pipeline))
        activations = activations * min(layers, model.num_layers) * pipeline // model.num_layers
    rows = min(tokens, LOSS_CHUNK_TOKENS)
    return Memory(
        weights=width * params // weight_shards,
        gradients=(4 if accumulate or not half else 2) * params // grad_shards,
        optimizer=(12 if half else 8) * params // shards,
        activations=activations,
        logits=rows * (padded_vocab_size(model) // tensor) * (width + 4),
    )


def _activations(model: ModelSection, tensor: int, outer: int, tokens: int, width: int, *, full_recompute: bool) -> int:
    """Saved for backward: per token and layer two norms, their inputs, and the sliced inner values of both halves.

    ``outer``: ranks that the tokens between sliced layers are shared out over.
    """
    h = model.hidden_size
    query, groups = model.num_attention_heads * head_dim(model), num_query_groups(model) * head_dim(model)
    inner = ffn_hidden_size(model) * (3 if is_gated(model) else 2)
    outside = 4 * h * width  # inputs and outputs of the two norms
    if model.hidden_dropout > 0:
        outside += 2 * h  # byte masks
    sliced = (2 * query + 2 * groups + inner) * width // tensor  # q, k, v, context; both sides of the activation
    layer = tokens * (outside // outer + sliced)
    if full_recompute:
        return tokens * h * width // outer * model.num_layers + layer
    return layer * model.num_layers
