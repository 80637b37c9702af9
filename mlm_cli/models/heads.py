"""Heads that tasks put on a model in place of its head of pretraining, or that head itself where texts are written.

Each computes what transformers' class of the same name does: ``...ForSequenceClassification``,
``...ForTokenClassification``, ``...ForQuestionAnswering``, ``...ForMultipleChoice``, or the bare model for embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlm_cli.config.schema import ModelSection
from mlm_cli.errors import UsageError
from mlm_cli.models.bert import Dense
from mlm_cli.models.model import Batch, Model
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.layers import new_parameter
from mlm_cli.parallel.random import initialize


@dataclass(frozen=True)
class HeadSpec:
    """What a task reads from the states of a text.

    Attributes:
        reads: ``sequence``: scores of the whole text; ``token``: of each token; ``embedding``: one vector; ``words``:
            the next word, by the model's own output layer.
        num_outputs: scores a text or token; 0 for embeddings.
        pooling: of embeddings: the mean of all states, or one state: BERT's first, a causal model's last.
        dropout: as that between layers, before the scores of a token (token classification has it, spans do not).
    """

    reads: Literal["sequence", "token", "embedding", "words"]
    num_outputs: int = 0
    pooling: Literal["mean", "cls"] = "mean"
    dropout: bool = True

    @property
    def own(self) -> bool:
        """Is it the head of pretraining that stays?"""
        return self.reads == "words"


class Output(nn.Module):
    """A linear layer from a state to scores, equal on all tensor ranks; computed in float32 whatever the weights'."""

    def __init__(
        self, hidden_size: int, num_outputs: int, bias: bool, init_std: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.weight = new_parameter(num_outputs, hidden_size, init=init_std, dtype=dtype, device=device)
        self.bias = new_parameter(num_outputs, init="zeros", dtype=dtype, device=device) if bias else None

    def forward(self, states: Tensor) -> Tensor:
        """``states [..., h]`` -> float32 ``[..., outputs]``."""
        return F.linear(states.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class SequenceHead(nn.Module):
    """Scores of a text: from BERT's first token through the pooler (a layer with tanh), from a causal model's last."""

    def __init__(self, spec: HeadSpec, model: ModelSection, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        h, options = model.hidden_size, (model.init_std, dtype, device)
        first = reads_first_token(model)
        self.dropout = model.hidden_dropout
        self.pooler = Dense(h, h, *options) if first else None
        self.output = Output(h, spec.num_outputs, first, *options)

    def forward(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """``hidden [r, s, h]``, ``lengths [r]`` -> float32 ``[r, outputs]``."""
        if self.pooler is None:
            return self.output(_last(hidden, lengths))
        pooled = torch.tanh(self.pooler(hidden[:, 0]))
        return self.output(F.dropout(pooled, self.dropout, self.training))


class TokenHead(nn.Module):
    """Scores of every token."""

    def __init__(self, spec: HeadSpec, model: ModelSection, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.dropout = model.hidden_dropout if spec.dropout else 0.0
        self.output = Output(model.hidden_size, spec.num_outputs, True, model.init_std, dtype, device)

    def forward(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """``hidden [r, s, h]`` -> float32 ``[r, s, outputs]``; what stands on padding means nothing."""
        return self.output(F.dropout(hidden, self.dropout, self.training))


class EmbeddingHead(nn.Module):
    """One vector of length 1 a text (Reimers and Gurevych 2019, section 3). It has no parameters."""

    def __init__(self, spec: HeadSpec, model: ModelSection, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.pooling, self.first = spec.pooling, reads_first_token(model)

    def forward(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """``hidden [r, s, h]``, ``lengths [r]`` -> float32 ``[r, h]``."""
        if self.pooling == "mean":
            real = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
            pooled = (hidden.float() * real[..., None]).sum(1) / lengths[:, None]
        else:
            pooled = (hidden[:, 0] if self.first else _last(hidden, lengths)).float()
        return F.normalize(pooled, dim=-1)


_HEADS = {"sequence": SequenceHead, "token": TokenHead, "embedding": EmbeddingHead}


def reads_first_token(model: ModelSection) -> bool:
    """Whether a text is summed up by its first token; else by its last, the only one that a causal model reads all to.

    Raises:
        UsageError: the family has no heads of tasks.
    """
    if model.family not in ("gpt", "bert"):
        raise UsageError(
            f"tasks have no heads for the {model.family} family",
            hint="start from a model of the gpt or bert family",
        )
    return model.family == "bert"


class TaskModel(nn.Module):
    """A model without its head of pretraining, and a task's head on it; or with that head, where texts are written.

    Texts are padded on the right: a causal model sees nothing behind a text, BERT is told the lengths.

    Args:
        backbone: built with ``head=spec.own``, taken over.
        seed: initial weights of the head are a function of it and the parameter's name; None leaves them unfilled.
    """

    def __init__(self, backbone: Model, spec: HeadSpec, *, seed: int | None) -> None:
        super().__init__()
        assert (backbone.head is not None) == spec.own
        self.backbone, self.spec = backbone, spec
        self.head: nn.Module | None = None
        if not spec.own:
            self.head = _HEADS[spec.reads](spec, backbone.config, backbone.dtype, backbone.parallel.device)
        if seed is not None and self.head is not None:
            initialize(self.head, backbone.parallel, seed, prefix="head.")

    @property
    def parallel(self) -> ParallelContext:
        return self.backbone.parallel

    def forward(self, batch: Batch) -> Tensor:
        """Scores or embeddings in float32, ``[r, outputs]``, ``[r, s, outputs]`` or ``[r, h]``, as the head says.

        With the model's own head ``[2]``: the mean cross entropy of the texts to be written, and the tokens it is over.

        Args:
            batch: ``tokens [r, s]`` padded on the right, ``lengths [r]`` at least 1; ``token_types [r, s]`` where the
                model has them; what the model's own ``loss`` asks for.
        """
        if self.head is None:
            return torch.stack(self.backbone.loss(batch))
        hidden = self.backbone.run(batch["tokens"], self.backbone.info(batch))
        return self.head(hidden, batch["lengths"])


def _last(hidden: Tensor, lengths: Tensor) -> Tensor:
    """States of each text's last token, ``[r, h]``."""
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), lengths - 1]
