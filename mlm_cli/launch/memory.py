"""An estimate of what one rank holds while training, in bytes, each part with its formula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlm_cli.config.schema import ModelSection, Recipe
from mlm_cli.config.shapes import (
    decoder_seq_length,
    ffn_hidden_size,
    head_dim,
    is_gated,
    num_decoder_layers,
    num_query_groups,
    padded_vocab_size,
)
from mlm_cli.models.count import layer_counts
from mlm_cli.models.stages import balance, layer_costs
from mlm_cli.parallel.logits import LOGITS_BYTES

ACTIVATIONS_FORMULA = "Korthikanti et al. 2022, table 2, without the attention matrix (fused attention)"


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        offload: ``cpu``: weights, gradients and optimizer lie in the memory of the host; ``nvme``: optimizer on a disk.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    offload: Literal["none", "cpu", "nvme"] = "none"

    @property
    def host(self) -> int:
        """Beside the device."""
        if self.offload == "none":
            return 0
        return self.weights + self.gradients + (self.optimizer if self.offload == "cpu" else 0)

    @property
    def disk(self) -> int:
        """Beside both."""
        return self.optimizer if self.offload == "nvme" else 0

    @property
    def total(self) -> int:
        """On the device."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits - self.host - self.disk


def parameters_per_rank(model: ModelSection, tensor: int, pipeline: int = 1) -> int:
    """Of the rank that holds most. A stage that uses words or tables of another one holds a copy of them."""
    layers = layer_counts(model)

    def held(part: range) -> int:
        here = {layers[number].name for number in part}
        copies = {name: size for number in part for name, size in layers[number].tied.items() if name not in here}
        return sum(layers[number].held(tensor) for number in part) + sum(copies.values()) // tensor

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
    micro = recipe.train.micro_batch_size
    tokens = micro * model.seq_length // recipe.parallel.context
    targets = micro * decoder_seq_length(model) if model.family == "t5" else 0
    outer = tensor if recipe.parallel.sequence else 1
    full = recipe.train.recompute == "full"
    activations = _activations(model, tensor, outer, tokens, targets, width, full_recompute=full)
    if pipeline > 1:
        # The first stage keeps a micro-batch for every stage behind it (Narayanan et al. 2021, section 2.2).
        layers, most = max(len(part) for part in balance(layer_costs(model), pipeline)), _num_layers(model)
        activations = activations * min(layers, most) * pipeline // most
    columns = padded_vocab_size(model) // tensor
    rows = min(targets or tokens, max(LOGITS_BYTES["cuda"] // (columns * width), 32))
    return Memory(
        weights=width * params // weight_shards,
        gradients=(4 if accumulate or not half else 2) * params // grad_shards,
        optimizer=(12 if half else 8) * params // shards,
        activations=activations,
        logits=rows * columns * width,
        offload=recipe.parallel.offload,
    )


def _num_layers(model: ModelSection) -> int:
    return model.num_layers + (num_decoder_layers(model) if model.family == "t5" else 0)


def _activations(
    model: ModelSection, tensor: int, outer: int, tokens: int, targets: int, width: int, *, full_recompute: bool
) -> int:
    """Saved for backward: per token and layer two norms, their inputs, and the sliced inner values of both halves.

    A layer of T5's decoder also keeps what attention across has: a norm, queries and context of its own tokens, keys
    and values of the encoder's.

    Args:
        outer: ranks that the tokens between sliced layers are shared out over.
        tokens, targets: of a micro-batch on this rank, the latter of T5's decoder.
    """
    h = model.hidden_size
    query, groups = model.num_attention_heads * head_dim(model), num_query_groups(model) * head_dim(model)
    inner = ffn_hidden_size(model) * (3 if is_gated(model) else 2)
    outside = 4 * h * width  # inputs and outputs of the two norms
    if model.hidden_dropout > 0:
        outside += 2 * h  # byte masks
    sliced = (2 * query + 2 * groups + inner) * width // tensor  # q, k, v, context; both sides of the activation
    layer, inputs = tokens * (outside // outer + sliced), tokens * h * width // outer
    kept, saved = layer * model.num_layers, inputs * model.num_layers
    if model.family == "t5":
        across = targets * (2 * h // outer + 2 * query // tensor) * width + tokens * 2 * query // tensor * width
        decoder = targets * (outside // outer + sliced) + across
        kept += decoder * num_decoder_layers(model)
        saved += targets * h * width // outer * num_decoder_layers(model)
        layer = max(layer, decoder)
    return saved + layer if full_recompute else kept
