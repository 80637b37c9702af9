"""T5 (Raffel et al. 2020, https://arxiv.org/abs/1910.10683): an encoder, and a decoder that reads what it made.

From the same layers as GPT, with relative positions (``relative``), attention across (``cross_attention``), and no
scaling of attention scores, which is in the initial weights (``config.initial_std``). Version 1.0 has relu and an
output layer tied to the word embedding, on states scaled by ``hidden_size ** -0.5``; version 1.1 a gated gelu (Shazeer
2020) and an output layer of its own. Dropout as in mesh-tensorflow and transformers: on embeddings, attention
probabilities, inner width and end of each branch, and after both final norms.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlm_cli.config.schema import ModelSection
from mlm_cli.config.shapes import num_decoder_layers
from mlm_cli.models.block import Block, Masks, Norm
from mlm_cli.models.cache import KVCache, LayerCache
from mlm_cli.models.cross_attention import DecoderBlock
from mlm_cli.models.embedding import Embedding, shared_words
from mlm_cli.models.gpt import Head
from mlm_cli.models.info import SequenceInfo, cross_info, encoder_info
from mlm_cli.models.model import Batch, Model
from mlm_cli.models.relative import RelativeBias
from mlm_cli.models.spec import LayerSpec, Shared
from mlm_cli.models.stages import layer_costs
from mlm_cli.ops import products
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.cross_entropy import vocab_parallel_argmax
from mlm_cli.parallel.linear_cross_entropy import vocab_parallel_linear_cross_entropy
from mlm_cli.parallel.sequence import gather_tokens


@dataclass(frozen=True)
class T5Info:
    """What the layers of one pass share.

    Attributes:
        encoder, decoder: of the tokens of each stack.
        cross: of the encoder's tokens as keys of the decoder.
        decoder_tokens: ``[b, s_dec]``.
        sizes: tokens of both stacks that this rank holds between sliced layers.
    """

    encoder: SequenceInfo
    decoder: SequenceInfo
    cross: SequenceInfo
    decoder_tokens: Tensor
    sizes: tuple[int, int]


class FinalNorm(Norm):
    """The norm at the end of a stack, and dropout."""

    def __init__(self, model: ModelSection, parallel: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__(model, parallel, dtype)
        self.hidden_dropout = model.hidden_dropout
        self.masks: Masks = nullcontext

    def forward(self, x: Tensor, info: SequenceInfo | None = None) -> Tensor:
        """``[b, s, h]`` -> ``[b, s, h]``."""
        x = super().forward(x)
        with self.masks():
            return F.dropout(x, self.hidden_dropout) if self.training and self.hidden_dropout else x


def t5_layer_specs(model: ModelSection, parallel: ParallelContext, dtype: torch.dtype) -> list[LayerSpec]:
    """The whole model as a flat list: embedding, encoder, its norm, decoder, its norm, output layer."""
    costs, words = layer_costs(model), shared_words(model, parallel, dtype)
    tables = {
        stack: (Shared(f"{stack}_bias", lambda both=stack == "encoder": _table(model, parallel, dtype, both)),)
        for stack in ("encoder", "decoder")
    }
    layers, first = model.num_layers, model.num_layers + 2
    return [
        LayerSpec("embedding", lambda: Embedding(model, parallel, dtype), shared=words),
        *(
            LayerSpec(f"encoder.{i}", lambda: Block(model, parallel, dtype), costs[1 + i], tables["encoder"])
            for i in range(layers)
        ),
        LayerSpec("encoder_norm", lambda: FinalNorm(model, parallel, dtype)),
        *(
            LayerSpec(f"decoder.{i}", lambda: DecoderBlock(model, parallel, dtype), costs[first + i], tables["decoder"])
            for i in range(num_decoder_layers(model))
        ),
        LayerSpec("final_norm", lambda: FinalNorm(model, parallel, dtype)),
        LayerSpec("head", lambda: Head(model, parallel, dtype), costs[-1], words),
    ]


def _table(model: ModelSection, parallel: ParallelContext, dtype: torch.dtype, both_ways: bool) -> RelativeBias:
    return RelativeBias(model, parallel, dtype, both_ways=both_ways)


class T5(Model):
    """An encoder and decoder. See ``Model``; batches have what ``data`` gives for the family:

    ``tokens [b, s_enc]``, padded on the right beyond ``lengths [b]`` where given; ``decoder_tokens [b, s_dec]``, which
    begin with the padding id; ``labels, loss_mask [b, s_dec]``.

    Inside a stage the states of encoder and decoder are two tensors; between stages they travel as one,
    ``[b, s_enc + s_dec, h]``.
    """

    embedding: Embedding
    encoder: nn.ModuleList
    encoder_norm: FinalNorm
    decoder: nn.ModuleList
    final_norm: FinalNorm
    head: Head
    encoder_bias: RelativeBias | None
    decoder_bias: RelativeBias | None

    score_names: ClassVar[tuple[str, ...]] = ("loss", "accuracy")

    def __init__(
        self,
        model: ModelSection,
        parallel: ParallelContext,
        dtype: torch.dtype,
        part: range | None = None,
        head: bool = True,
    ) -> None:
        super().__init__(model, parallel, dtype, t5_layer_specs(model, parallel, dtype), part, head)
        for name in ("encoder_bias", "decoder_bias"):
            if name not in self.shared:
                setattr(self, name, None)
        self.output_scale = model.hidden_size**-0.5 if model.tie_embeddings else 1.0

    def info(self, batch: Batch) -> T5Info:
        """Biases are made of the tables of the stacks that this stage has layers of."""
        tokens, decoder_tokens = batch["tokens"], batch["decoder_tokens"]
        s_enc, s_dec, ranks = tokens.shape[1], decoder_tokens.shape[1], self.parallel.sequence.size
        keys = encoder_info(tokens, lengths=batch.get("lengths"), dtype=self.dtype)
        bias = None if self.encoder_bias is None else self.encoder_bias(s_enc, s_enc)
        if bias is not None and keys.visible is not None:
            bias = bias.masked_fill(~keys.visible, -torch.inf)
        decoder = encoder_info(decoder_tokens, dtype=self.dtype)
        if self.decoder_bias is not None:
            decoder = replace(decoder, bias=self.decoder_bias(s_dec, s_dec), runs=None)
        encoder = replace(keys, visible=None, bias=bias, runs=None)
        return T5Info(encoder, decoder, cross_info(keys, s_dec), decoder_tokens, (s_enc // ranks, s_dec // ranks))

    def run(self, x: Tensor, info: T5Info) -> Tensor:
        """The layers of this part, in order.

        Args:
            x: the encoder's tokens ``[b, s_enc]`` where it begins the model, else ``[b, s_enc + s_dec, h]``.

        Returns:
            ``[b, s_enc + s_dec, h]``, or the decoder's states ``[b, s_dec, h]`` where it ends the model.
        """
        if self.has_embedding:
            encoder, decoder = self.embedding(x, info.encoder), self.embedding(info.decoder_tokens, info.decoder)
        else:
            encoder, decoder = x.split(info.sizes, 1)
        for layer, repeats in self._order:
            if isinstance(layer, DecoderBlock):
                decoder = self._call(layer, repeats, decoder, encoder, info.decoder, info.cross)
            elif layer is self.final_norm:
                decoder = layer(decoder)
            elif layer is not self.embedding:
                encoder = self._call(layer, repeats, encoder, info.encoder)
        return gather_tokens(decoder, self.parallel.sequence) if self.has_head else torch.cat([encoder, decoder], 1)

    def boundary(self, batch: Batch) -> tuple[int, ...]:
        b, s_enc = batch["tokens"].shape
        return b, (s_enc + batch["decoder_tokens"].shape[1]) // self.parallel.sequence.size, self.config.hidden_size

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden [..., h]`` of the decoder -> this rank's columns ``[..., v_local]``, padding included."""
        return products.linear(self._scaled(hidden), self.output_weight)

    def _scaled(self, hidden: Tensor) -> Tensor:
        """What the output layer is multiplied with."""
        return hidden if self.output_scale == 1.0 else hidden * self.output_scale

    def forward(self, tokens: Tensor, decoder_tokens: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """Logits of this rank's slice of the vocabulary, ``[b, s_dec, v_local]``; arguments as in a batch."""
        batch = {"tokens": tokens, "decoder_tokens": decoder_tokens}
        if lengths is not None:
            batch["lengths"] = lengths
        return self.logits(self.run(tokens, self.info(batch)))

    def gather_logits(self, logits: Tensor) -> Tensor:
        """``[..., v_local]`` -> ``[..., vocab_size]`` on every rank: gathered over the tensor group, padding cut."""
        return torch.cat(self.parallel.tensor.all_gather(logits), -1)[..., : self.vocab_size]

    def loss_of(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean cross entropy of the targets' tokens, and how many they are.

        Args:
            hidden: of the decoder, ``[b, s_dec, h]``.
        """
        labels, mask = batch["labels"].reshape(-1), batch.get("loss_mask")
        if self.contrast is not None:
            hidden = self.contrast(hidden, None if mask is None else mask > 0)
        count = hidden.new_tensor(float(labels.numel()), dtype=torch.float32) if mask is None else mask.float().sum()
        loss = vocab_parallel_linear_cross_entropy(
            self._scaled(hidden).reshape(-1, hidden.shape[-1]),
            self.output_weight,
            labels,
            None if mask is None else mask.reshape(-1),
            self.parallel.tensor,
            self.vocab_size,
            scale=1.0 / count.clamp(min=1.0),
        )
        return loss, count

    @torch.no_grad()
    def scores_of(self, hidden: Tensor, batch: Batch) -> Tensor:
        loss, count = self.loss_of(hidden, batch)
        labels = batch["labels"].reshape(-1)
        logits = self.logits(hidden).reshape(len(labels), -1)
        right = vocab_parallel_argmax(logits, self.parallel.tensor, self.vocab_size) == labels
        if "loss_mask" in batch:
            right = right * batch["loss_mask"].reshape(-1)
        return torch.stack(
            [torch.stack([loss.double() * count, count.double()]), torch.stack([right.double().sum(), count.double()])]
        )

    def count_tokens(self, batch: Batch) -> Tensor:
        """Tokens that the encoder and the decoder read, padding left out."""
        mask = batch.get("loss_mask")
        targets = batch["labels"].new_tensor(batch["labels"].numel()) if mask is None else mask.sum().long()
        return super().count_tokens(batch) + targets

    # Decoding --------------------------------------------------------------------------------------------------------

    def encode(self, tokens: Tensor) -> Tensor:
        """The encoder's states ``[b, s_enc, h]`` of ``tokens [b, s_enc]``, all of one length."""
        assert self.encoder_bias is not None
        info = replace(encoder_info(tokens), bias=self.encoder_bias(tokens.shape[1], tokens.shape[1]), runs=None)
        x = self.embedding(tokens, info)
        for layer in self.encoder:
            x = layer(x, info)
        return self.encoder_norm(x)

    def cross_keys(self, encoded: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What each decoder layer looks at, from the encoder's states."""
        return [layer.cross.keys(encoded) for layer in self.decoder]

    def decode(
        self,
        tokens: Tensor,
        positions: Tensor,
        caches: list[LayerCache],
        cross_keys: list[tuple[Tensor, Tensor]],
        *,
        num_keys: int,
        visible: Tensor | None = None,
    ) -> Tensor:
        """The decoder's states ``[b, 1, h]`` of one token a row.

        Args:
            tokens: ``[b, 1]``, at ``positions [b]`` of their texts.
            caches: keys and values of each layer; they give back ``num_keys`` with those of ``tokens``, padded on the
                right.
            cross_keys: of each layer.
            visible: ``[b, 1, 1, keys]``, which of the cross keys are tokens.
        """
        assert self.decoder_bias is not None
        info = SequenceInfo(positions[:, None], bias=self.decoder_bias.at(positions, num_keys))
        cross = SequenceInfo(positions[:, None], visible=visible, causal=False)
        x = self.embedding(tokens, info)
        for layer, cache, keys in zip(self.decoder, caches, cross_keys, strict=True):
            x = layer(x, keys, info, cross, cache)
        return self.final_norm(x)

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """Room for ``max_length`` tokens a row of the decoder."""
        first = self.decoder[0].attention
        shape = (batch_size, first.num_groups, max_length, first.dim)
        return KVCache([LayerCache(shape, self.dtype, self.parallel.device) for _ in self.decoder], max_length)
