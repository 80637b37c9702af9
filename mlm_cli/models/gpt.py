"""GPT: embedding, transformer layers, final norm and output layer, as a list of layers run in sequence."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from mlm_cli.config.initial_std import initial_std
from mlm_cli.config.schema import ModelSection
from mlm_cli.config.shapes import is_sparse, padded_vocab_size
from mlm_cli.models.block import Block, Norm
from mlm_cli.models.cache import KVCache, LayerCache
from mlm_cli.models.embedding import Embedding, shared_words
from mlm_cli.models.info import SequenceInfo, build_info
from mlm_cli.models.model import Batch, Model
from mlm_cli.models.spec import LayerSpec
from mlm_cli.models.stages import layer_costs
from mlm_cli.ops import products
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.layers import new_parameter
from mlm_cli.parallel.linear_cross_entropy import token_losses, vocab_parallel_linear_cross_entropy
from mlm_cli.parallel.sequence import own_tokens
from mlm_cli.parallel.shard import Shard
from mlm_cli.parallel.ulysses import sum_of_shares


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
                init=initial_std(model).head,
                shard=Shard(0, valid=model.vocab_size),
                dtype=dtype,
                device=parallel.device,
            )


def gpt_layer_specs(model: ModelSection, parallel: ParallelContext, dtype: torch.dtype) -> list[LayerSpec]:
    """The whole model as a flat list: embedding, layers, final norm, output layer."""
    costs = layer_costs(model)
    words = shared_words(model, parallel, dtype)
    return [
        LayerSpec("embedding", lambda: Embedding(model, parallel, dtype), shared=words),
        *(
            LayerSpec(f"layers.{i}", partial(Block, model, parallel, dtype, i), costs[1 + i])
            for i in range(model.num_layers)
        ),
        LayerSpec("final_norm", lambda: Norm(model, parallel, dtype)),
        LayerSpec("head", lambda: Head(model, parallel, dtype), costs[-1], words),
    ]


class GPT(Model):
    """A causal language model. See ``Model``."""

    embedding: Embedding
    layers: nn.ModuleList
    final_norm: Norm
    head: Head

    def __init__(
        self,
        model: ModelSection,
        parallel: ParallelContext,
        dtype: torch.dtype,
        part: range | None = None,
        head: bool = True,
    ) -> None:
        super().__init__(model, parallel, dtype, gpt_layer_specs(model, parallel, dtype), part, head)

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
            tokens,
            positions=positions,
            segments=segments,
            cache=cache,
            table=self._rotary,
            dtype=self.dtype,
            sparse=is_sparse(self.config),
        )
        if cache is None:
            return self.run(tokens, info)
        x = self.embedding(tokens, info)
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = layer(x, info, layer_cache)
        cache.length += tokens.shape[1]
        return self.final_norm(x)

    def info(self, batch: Batch) -> SequenceInfo:
        return build_info(
            batch["tokens"],
            positions=batch.get("positions"),
            segments=batch.get("segments"),
            table=self._rotary,
            dtype=self.dtype,
            sparse=is_sparse(self.config),
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden [..., h]`` -> this rank's columns ``[..., v_local]``, padding included."""
        return products.linear(hidden, self.output_weight)

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

    def loss_of(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean cross entropy of the next token, and the number of tokens it is over.

        Args:
            hidden: ``[b, s, h]``.
            batch: ``labels [b, s]``; optional ``loss_mask [b, s]``.
        """
        labels, mask, context = batch["labels"], batch.get("loss_mask"), self.parallel.context
        if self.contrast is not None:
            hidden = self.contrast(hidden, _real(batch), batch.get("segments"))
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


def _real(batch: Batch) -> Tensor | None:
    """``[b, s]``: which tokens are no padding; None where all are."""
    if "lengths" not in batch:
        return None
    tokens, lengths = batch["tokens"], batch["lengths"]
    return torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
