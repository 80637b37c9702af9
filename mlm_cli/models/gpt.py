"""GPT: embedding, transformer layers, final norm and output layer, as a list of layers run in sequence."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlm_cli.config.schema import ModelSection
from mlm_cli.config.shapes import head_dim, padded_vocab_size
from mlm_cli.models.block import Block, Masks, Norm
from mlm_cli.models.cache import KVCache, LayerCache
from mlm_cli.models.info import SequenceInfo, build_info
from mlm_cli.models.rotary import RotaryTable
from mlm_cli.models.spec import LayerSpec
from mlm_cli.models.stages import balance, layer_costs
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.layers import VocabParallelEmbedding, new_parameter
from mlm_cli.parallel.linear_cross_entropy import token_losses, vocab_parallel_linear_cross_entropy
from mlm_cli.parallel.mappings import copy_to_group
from mlm_cli.parallel.random import initialize
from mlm_cli.parallel.sequence import gather_tokens, own_tokens
from mlm_cli.parallel.shard import Shard
from mlm_cli.parallel.ulysses import sum_of_shares

if TYPE_CHECKING:
    from mlm_cli.parallel.random import RandomStreams


class Embedding(nn.Module):
    """Word embedding, plus learned positions where the model has them."""

    def __init__(self, model: ModelSection, parallel: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        assert model.vocab_size is not None
        options = {"init_std": model.init_std, "dtype": dtype, "device": parallel.device}
        self.hidden_dropout, self.context = model.hidden_dropout, parallel.context
        self.masks: Masks = nullcontext
        sizes = (model.vocab_size, padded_vocab_size(model), model.hidden_size)
        self.word = VocabParallelEmbedding(*sizes, parallel.tensor, sequence=parallel.sequence, **options)
        self.position = Position(model, parallel, dtype) if model.position == "learned" else None

    def forward(self, tokens: Tensor, info: SequenceInfo) -> Tensor:
        """``tokens [b, s]`` -> ``[b, s, h]``, of this rank's tokens."""
        x = self.word(own_tokens(tokens, self.context))
        if self.position is not None:
            x = x + self.position(own_tokens(info.positions, self.context, -1))
        with self.masks():
            return F.dropout(x, self.hidden_dropout) if self.training and self.hidden_dropout else x


class Position(nn.Module):
    """Learned positions, equal on all tensor ranks."""

    def __init__(self, model: ModelSection, parallel: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        self.sequence = parallel.sequence
        shape = (model.seq_length, model.hidden_size)
        self.weight = new_parameter(*shape, init=model.init_std, dtype=dtype, device=parallel.device)

    def forward(self, positions: Tensor) -> Tensor:
        return F.embedding(own_tokens(positions, self.sequence, -1), copy_to_group(self.weight, self.sequence))


class TiedWords(nn.Module):
    """A stage's copy of the word embedding, where the output layer that shares it is on another stage."""

    masks: Masks

    def __init__(self, model: ModelSection, parallel: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        sizes = (model.vocab_size or 0, padded_vocab_size(model), model.hidden_size)
        options = {"init_std": model.init_std, "dtype": dtype, "device": parallel.device}
        self.word = VocabParallelEmbedding(*sizes, parallel.tensor, **options)


class Head(nn.Module):
    """Output layer: the rows of the vocabulary cut over the tensor group. Tied, it has no weight of its own."""

    def __init__(self, model: ModelSection, parallel: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        rows = padded_vocab_size(model) // parallel.tensor.size
        self.weight: nn.Parameter | None = None
        if not model.tie_embeddings:
            self.weight = new_parameter(
                rows,
                model.hidden_size,
                init=model.init_std,
                shard=Shard(0, valid=model.vocab_size),
                dtype=dtype,
                device=parallel.device,
            )


def gpt_layer_specs(model: ModelSection, parallel: ParallelContext, dtype: torch.dtype) -> list[LayerSpec]:
    """The whole model as a flat list: embedding, layers, final norm, output layer."""
    costs = layer_costs(model)
    tied = "embedding.word.weight" if model.tie_embeddings else None
    return [
        LayerSpec("embedding", lambda: Embedding(model, parallel, dtype)),
        *(
            LayerSpec(f"layers.{i}", lambda: Block(model, parallel, dtype), costs[1 + i])
            for i in range(model.num_layers)
        ),
        LayerSpec("final_norm", lambda: Norm(model, parallel, dtype)),
        LayerSpec("head", lambda: Head(model, parallel, dtype), costs[-1], tied),
    ]


class GPT(nn.Module):
    """A causal language model, or this rank's slice of one, or a stage of a pipeline.

    Args:
        part: numbers of the layers of ``gpt_layer_specs`` that are built here; unset: all.

    Attributes:
        config: the model section it was built from.
        parallel: the groups it is cut over.
        has_embedding, has_head: whether this part begins, or ends, the model.
        recompute: rebuild each layer's activations in the backward pass instead of keeping them.
        streams: dropout streams; set by training when there is dropout.
    """

    def __init__(
        self, model: ModelSection, parallel: ParallelContext, dtype: torch.dtype, part: range | None = None
    ) -> None:
        super().__init__()
        self.config, self.parallel, self.dtype = model, parallel, dtype
        self.recompute = False
        self.streams: RandomStreams | None = None
        specs = gpt_layer_specs(model, parallel, dtype)
        mine = specs if part is None else [specs[number] for number in part]
        built: dict[str, Any] = {spec.name: spec.build() for spec in mine}
        self.has_embedding, self.has_head = "embedding" in built, "head" in built
        self.embedding: Embedding = built.get("embedding")
        if any(spec.tied for spec in mine) and not self.has_embedding:
            self.embedding = TiedWords(model, parallel, dtype)  # type: ignore[assignment]
        # Layers keep their numbers, so that parameters have the same names whatever part of the model this is.
        self.layers = nn.ModuleList()
        for name, layer in built.items():
            if name.startswith("layers."):
                self.layers.add_module(name.removeprefix("layers."), layer)
        self.final_norm: Norm = built.get("final_norm")
        self.head: Head = built.get("head")
        self._rotary = RotaryTable(head_dim(model), model.rotary_base) if model.position == "rotary" else None

    @property
    def vocab_size(self) -> int:
        assert self.config.vocab_size is not None
        return self.config.vocab_size

    @property
    def output_weight(self) -> Tensor:
        """Rows of the output layer of this rank, ``[v_local, h]``; the word embedding's where they are tied."""
        return self.embedding.word.weight if self.head.weight is None else self.head.weight

    def read_outside(self) -> list[Tensor]:
        """Parameters that are used outside of their module's ``forward`` (ZeRO-3 must know)."""
        return [self.output_weight]

    def set_streams(self, streams: RandomStreams) -> None:
        """Draw dropout inside sliced regions from ``streams``."""
        self.streams = streams
        # Where each rank holds other tokens, its masks between sliced layers are its own too.
        masks = streams.sliced if self.parallel.sequence.size > 1 else nullcontext
        if self.embedding is not None:
            self.embedding.masks = masks
        for layer in self.layers:
            layer.attention.streams, layer.masks = streams, masks

    def hidden(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Activations after the final norm, ``[b, s, h]``, for ``tokens [b, s]``.

        Args:
            positions: ``[b, s]``; unset counts from 0 (or from where the cache ends).
            segments: ``[b, s]`` document numbers: no attention across documents.
            cache: earlier tokens; these are added to it.
        """
        info = build_info(
            tokens, positions=positions, segments=segments, cache=cache, table=self._rotary, dtype=self.dtype
        )
        if cache is None:
            return self.run(tokens, info)
        x = self.embedding(tokens, info)
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = layer(x, info, layer_cache)
        cache.length += tokens.shape[1]
        return self.final_norm(x)

    def info(self, batch: dict[str, Tensor]) -> SequenceInfo:
        """What every layer shares of a pass over ``batch``; any stage can work it out."""
        return build_info(
            batch["tokens"],
            positions=batch.get("positions"),
            segments=batch.get("segments"),
            table=self._rotary,
            dtype=self.dtype,
        )

    def run(self, x: Tensor, info: SequenceInfo) -> Tensor:
        """The layers of this part, in order. ``x``: tokens ``[b, s]`` where it begins the model, else ``[b, s, h]``."""
        if self.has_embedding:
            x = self.embedding(x, info)
        for layer in self.layers:
            x = self._recomputed(layer, x, info) if self.recompute and torch.is_grad_enabled() else layer(x, info)
        if self.final_norm is not None:
            x = self.final_norm(x)
        return gather_tokens(x, self.parallel.sequence) if self.has_head else x

    def _recomputed(self, layer: nn.Module, x: Tensor, info: SequenceInfo) -> Tensor:
        """Activation checkpointing (Chen et al. 2016): keep the layer's input only; dropout repeats itself."""
        dropout = self.training and max(self.config.hidden_dropout, self.config.attention_dropout) > 0
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": dropout}
        if dropout and self.streams is not None:
            options["context_fn"] = self.streams.recompute_contexts
        return checkpoint(layer, x, info, **options)

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden [..., h]`` -> this rank's columns ``[..., v_local]``, padding included."""
        return F.linear(hidden, self.output_weight)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits of this rank's slice of the vocabulary, ``[b, s, v_local]``; arguments as ``hidden``."""
        return self.logits(self.hidden(tokens, positions=positions, segments=segments, cache=cache))

    def gather_logits(self, logits: Tensor) -> Tensor:
        """``[..., v_local]`` -> ``[..., vocab_size]`` on every rank: gathered over the tensor group, padding cut."""
        return torch.cat(self.parallel.tensor.all_gather(logits), -1)[..., : self.vocab_size]

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean cross entropy (float32 scalar with gradient) and the number of tokens it is over.

        Args:
            batch: ``tokens, labels [b, s]``; optional ``loss_mask [b, s]``, ``positions``, ``segments``.
        """
        return self.loss_of(self.run(batch["tokens"], self.info(batch)), batch)

    def loss_of(self, hidden: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``loss`` from the activations after the final norm, ``[b, s, h]``: of this rank's tokens."""
        labels, mask, context = batch["labels"], batch.get("loss_mask"), self.parallel.context
        count = hidden.new_tensor(float(labels.numel()), dtype=torch.float32) if mask is None else mask.float().sum()
        loss = vocab_parallel_linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            self.output_weight,
            own_tokens(labels, context).reshape(-1),
            None if mask is None else own_tokens(mask, context).reshape(-1),
            self.parallel.tensor,
            self.vocab_size,
            scale=1.0 / count.clamp(min=1.0),
        )
        return sum_of_shares(loss, context), count

    @torch.no_grad()
    def token_losses(
        self, tokens: Tensor, labels: Tensor, *, positions: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """Cross entropy of each label, float32 ``[b, s]``."""
        hidden = self.hidden(tokens, positions=positions, segments=segments)
        flat = token_losses(
            hidden.reshape(-1, hidden.shape[-1]),
            self.output_weight,
            labels.reshape(-1),
            self.parallel.tensor,
            self.vocab_size,
        )
        return flat.view(labels.shape)

    def new_cache(self, batch_size: int, max_length: int, *, start: Tensor | None = None) -> KVCache:
        """Room for ``max_length`` tokens a row. ``start [b]``: padding tokens at the left of each row."""
        first = self.layers[0].attention
        shape = (batch_size, first.num_groups, max_length, first.dim)
        layers = [LayerCache(shape, self.dtype, self.parallel.device) for _ in self.layers]
        return KVCache(layers, max_length, start)


def build_gpt(
    model: ModelSection,
    parallel: ParallelContext,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 1234,
    init: bool = True,
) -> GPT:
    """Build this rank's slice of a GPT, and its stage where ``parallel.pipeline`` has several.

    Args:
        model: architecture, ``vocab_size`` set.
        dtype: of weights and activations.
        seed: initial weights are a function of it and the parameter's name, whatever the layout.
        init: False leaves weights unfilled (they will be loaded).
    """
    part = None
    if parallel.pipeline.size > 1:
        part = balance(layer_costs(model), parallel.pipeline.size)[parallel.pipeline.rank]
    gpt = GPT(model, parallel, dtype, part)
    if init:
        initialize(gpt, parallel, seed)
    return gpt
