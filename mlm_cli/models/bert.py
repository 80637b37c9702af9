"""BERT (Devlin et al. 2019): a masked language model, from the same layers as GPT but with every token in sight.

Post-norm is the original, pre-norm Megatron-LM's (Shoeybi et al. 2019, section 5.3: it is what lets BERT grow). Beside
the masked words it may learn whether two stretches of text follow each other (next sentence, Devlin et al. 2019) or
stand in order (sentence order, Lan et al. 2020).
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlm_cli.config.initial_std import initial_std
from mlm_cli.config.schema import ModelSection
from mlm_cli.config.shapes import padded_vocab_size
from mlm_cli.models.block import Block, Norm
from mlm_cli.models.embedding import Embedding, shared_words
from mlm_cli.models.info import SequenceInfo, encoder_info
from mlm_cli.models.model import Batch, Model
from mlm_cli.models.spec import LayerSpec
from mlm_cli.models.stages import layer_costs
from mlm_cli.ops import products
from mlm_cli.parallel.context import SOLO, ParallelContext
from mlm_cli.parallel.cross_entropy import vocab_parallel_argmax
from mlm_cli.parallel.layers import new_parameter
from mlm_cli.parallel.linear_cross_entropy import token_losses, vocab_parallel_linear_cross_entropy
from mlm_cli.parallel.shard import Shard


class Dense(nn.Module):
    """A linear layer that every tensor rank holds in full."""

    def __init__(self, rows: int, columns: int, init_std: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = new_parameter(rows, columns, init=init_std, dtype=dtype, device=device)
        self.bias = new_parameter(rows, init="zeros", dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return products.linear(x, self.weight, self.bias)


class BertHead(nn.Module):
    """What stands on the encoder: transform, norm and output layer of the masked words; pooler and binary scores.

    The output layer's rows, and its bias, are cut over the tensor group; the rest is held in full. It sees all tokens,
    also where ranks share them out.
    """

    def __init__(self, model: ModelSection, parallel: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        h, options = model.hidden_size, (model.init_std, dtype, parallel.device)
        rows, shard = padded_vocab_size(model) // parallel.tensor.size, Shard(0, valid=model.vocab_size)
        self.gelu_tanh = model.activation != "gelu_erf"
        self.transform = Dense(h, h, *options)
        self.norm = Norm(model, parallel, dtype, sequence=SOLO)
        self.weight: nn.Parameter | None = None
        if not model.tie_embeddings:
            std = initial_std(model).head
            self.weight = new_parameter(rows, h, init=std, shard=shard, dtype=dtype, device=parallel.device)
        self.bias = new_parameter(rows, init="zeros", shard=shard, dtype=dtype, device=parallel.device)
        binary = model.binary_head != "none"
        self.pooler = Dense(h, h, *options) if binary else None
        self.binary = Dense(2, h, *options) if binary else None

    def words(self, hidden: Tensor) -> Tensor:
        """``[..., h]`` -> what the output layer is multiplied with, ``[..., h]``."""
        return self.norm(F.gelu(self.transform(hidden), approximate="tanh" if self.gelu_tanh else "none"))

    def binary_logits(self, hidden: Tensor) -> Tensor:
        """``hidden [b, s, h]`` -> float32 ``[b, 2]``: as they stand, or swapped (or of another document)."""
        assert self.pooler is not None and self.binary is not None
        return self.binary(torch.tanh(self.pooler(hidden[:, 0]))).float()


def bert_layer_specs(model: ModelSection, parallel: ParallelContext, dtype: torch.dtype) -> list[LayerSpec]:
    """The whole model as a flat list. Post-norm layers end in a norm, so there is no final one."""
    costs = layer_costs(model)
    words = shared_words(model, parallel, dtype)
    pre = model.norm_order == "pre"
    return [
        LayerSpec("embedding", lambda: Embedding(model, parallel, dtype), shared=words),
        *(
            LayerSpec(f"layers.{i}", partial(Block, model, parallel, dtype, i), costs[1 + i])
            for i in range(model.num_layers)
        ),
        *([LayerSpec("final_norm", lambda: Norm(model, parallel, dtype))] if pre else []),
        LayerSpec("head", lambda: BertHead(model, parallel, dtype), costs[-1], words),
    ]


class Bert(Model):
    """A masked language model. See ``Model``; batches have what ``data`` gives for the family:

    ``tokens, token_types [b, s]``, ``lengths [b]``; ``masked_positions, labels, loss_mask [b, m]`` for at most ``m``
    masked words a sample; ``binary_labels [b]`` (1: swapped, or from another document) where there is a binary head.
    """

    embedding: Embedding
    layers: nn.ModuleList
    final_norm: Norm
    head: BertHead

    score_names: ClassVar[tuple[str, ...]] = ("loss", "accuracy")

    def __init__(
        self,
        model: ModelSection,
        parallel: ParallelContext,
        dtype: torch.dtype,
        part: range | None = None,
        head: bool = True,
    ) -> None:
        super().__init__(model, parallel, dtype, bert_layer_specs(model, parallel, dtype), part, head)
        if model.binary_head != "none":
            self.score_names = ("loss", "accuracy", "binary_loss", "binary_accuracy")  # type: ignore[misc]

    def read_outside(self) -> list[Tensor]:
        return [] if self.head is None else [self.output_weight, self.head.bias]

    def info(self, batch: Batch) -> SequenceInfo:
        return encoder_info(
            batch["tokens"],
            lengths=batch.get("lengths"),
            token_types=batch.get("token_types"),
            table=self._rotary,
            dtype=self.dtype,
        )

    def hidden(self, tokens: Tensor, *, lengths: Tensor | None = None, token_types: Tensor | None = None) -> Tensor:
        """The encoder's states ``[b, s, h]`` of ``tokens [b, s]``, padded on the right beyond ``lengths [b]``."""
        batch = {"tokens": tokens, "lengths": lengths, "token_types": token_types}
        return self.run(tokens, self.info({name: value for name, value in batch.items() if value is not None}))

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden [..., h]`` -> this rank's columns of the words' logits, ``[..., v_local]``, padding included."""
        return products.linear(self.head.words(hidden), self.output_weight, self.head.bias)

    def forward(self, tokens: Tensor, *, lengths: Tensor | None = None, token_types: Tensor | None = None) -> Tensor:
        """Logits of this rank's slice of the vocabulary everywhere, ``[b, s, v_local]``; arguments as ``hidden``."""
        return self.logits(self.hidden(tokens, lengths=lengths, token_types=token_types))

    def gather_logits(self, logits: Tensor) -> Tensor:
        """``[..., v_local]`` -> ``[..., vocab_size]`` on every rank: gathered over the tensor group, padding cut."""
        return torch.cat(self.parallel.tensor.all_gather(logits), -1)[..., : self.vocab_size]

    def loss_of(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean cross entropy of the masked words, plus that of the binary head; and the number of masked words.

        Args:
            hidden: ``[b, s, h]``.
        """
        loss, count = self._masked_loss(self._masked(hidden, batch), batch)
        if self.head.binary is not None:
            loss = loss + F.cross_entropy(self.head.binary_logits(hidden), batch["binary_labels"])
        return loss, count

    @torch.no_grad()
    def scores_of(self, hidden: Tensor, batch: Batch) -> Tensor:
        words, weights = self._masked(hidden, batch), batch["loss_mask"].reshape(-1).double()
        loss, count = self._masked_loss(words, batch)
        found = vocab_parallel_argmax(
            products.linear(words, self.output_weight, self.head.bias), self.parallel.tensor, self.vocab_size
        )
        right = ((found == batch["labels"].reshape(-1)) * weights).sum()
        rows = [torch.stack([loss.double() * count, count.double()]), torch.stack([right, count.double()])]
        if self.head.binary is not None:
            logits, labels = self.head.binary_logits(hidden), batch["binary_labels"]
            size = right.new_tensor(float(labels.numel()))
            rows.append(torch.stack([F.cross_entropy(logits, labels, reduction="sum").double(), size]))
            rows.append(torch.stack([(logits.argmax(-1) == labels).double().sum(), size]))
        return torch.stack(rows)

    @torch.no_grad()
    def masked_losses(self, tokens: Tensor, places: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of ``labels [b]`` at ``places [b]`` of ``tokens [b, s]``, which have no padding; ``[b]``."""
        hidden = self.hidden(tokens)[torch.arange(len(places), device=places.device), places]
        words, group = self.head.words(hidden), self.parallel.tensor
        return token_losses(words, self.output_weight, labels, group, self.vocab_size, self.head.bias)

    def _masked(self, hidden: Tensor, batch: Batch) -> Tensor:
        """States of the masked places alone, transformed: ``[b * m, h]``."""
        places = batch["masked_positions"]
        rows = torch.arange(places.shape[0], device=places.device)[:, None]
        return self.head.words(hidden[rows, places].reshape(-1, hidden.shape[-1]))

    def _masked_loss(self, words: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        mask = batch["loss_mask"].reshape(-1)
        count = mask.float().sum()
        loss = vocab_parallel_linear_cross_entropy(
            words,
            self.output_weight,
            batch["labels"].reshape(-1),
            mask,
            self.parallel.tensor,
            self.vocab_size,
            bias=self.head.bias,
            scale=1.0 / count.clamp(min=1.0),
        )
        return loss, count
