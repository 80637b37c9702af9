"""From token numbers to vectors: words, learned positions and token types."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlm_cli.config.schema import ModelSection
from mlm_cli.config.shapes import padded_vocab_size
from mlm_cli.models.block import Masks, Norm
from mlm_cli.models.info import SequenceInfo
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.layers import VocabParallelEmbedding, new_parameter
from mlm_cli.parallel.mappings import copy_to_group
from mlm_cli.parallel.sequence import own_tokens


class Embedding(nn.Module):
    """Word embedding, plus learned positions, token types and a norm where the model has them."""

    def __init__(self, model: ModelSection, parallel: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        assert model.vocab_size is not None
        options = {"init_std": model.init_std, "dtype": dtype, "device": parallel.device}
        self.hidden_dropout, self.context = model.hidden_dropout, parallel.context
        self.masks: Masks = nullcontext
        sizes = (model.vocab_size, padded_vocab_size(model), model.hidden_size)
        self.word = VocabParallelEmbedding(*sizes, parallel.tensor, sequence=parallel.sequence, **options)
        learned, types = model.position == "learned", model.num_token_types
        self.position = Position(model.seq_length, model, parallel, dtype) if learned else None
        self.token_type = Position(types, model, parallel, dtype) if types else None
        self.norm = Norm(model, parallel, dtype) if model.norm_order == "post" else None

    def forward(self, tokens: Tensor, info: SequenceInfo) -> Tensor:
        """``tokens [b, s]`` -> ``[b, s, h]``, of this rank's tokens."""
        tokens = own_tokens(tokens, self.context)
        x = self.word(tokens)
        if self.position is not None:
            x = x + self.position(own_tokens(info.positions, self.context, -1))
        if self.token_type is not None:
            types = torch.zeros_like(tokens) if info.token_types is None else info.token_types
            x = x + self.token_type(types)
        if self.norm is not None:
            x = self.norm(x)
        with self.masks():
            return F.dropout(x, self.hidden_dropout) if self.training and self.hidden_dropout else x


class Position(nn.Module):
    """Learned vectors of ``rows`` positions (or token types), equal on all tensor ranks."""

    def __init__(self, rows: int, model: ModelSection, parallel: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        self.sequence = parallel.sequence
        shape = (rows, model.hidden_size)
        self.weight = new_parameter(*shape, init=model.init_std, dtype=dtype, device=parallel.device)

    def forward(self, numbers: Tensor) -> Tensor:
        """``[b, s]`` or ``[s]`` -> the same with ``h`` behind, of this rank's tokens."""
        return F.embedding(own_tokens(numbers, self.sequence, -1), copy_to_group(self.weight, self.sequence))


class TiedWords(nn.Module):
    """A stage's copy of the word embedding, where the output layer that shares it is on another stage."""

    def __init__(self, model: ModelSection, parallel: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        sizes = (model.vocab_size or 0, padded_vocab_size(model), model.hidden_size)
        options = {"init_std": model.init_std, "dtype": dtype, "device": parallel.device}
        self.word = VocabParallelEmbedding(*sizes, parallel.tensor, **options)
