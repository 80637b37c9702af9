"""Heads that tasks put on a model in place of its output layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlm_cli.models.gpt import GPT
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.layers import new_parameter
from mlm_cli.parallel.random import initialize


class Score(nn.Module):
    """A linear layer without bias from a state to class scores, equal on all tensor ranks."""

    def __init__(self, hidden_size: int, num_labels: int, init_std: float, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.weight = new_parameter(num_labels, hidden_size, init=init_std, dtype=dtype, device=device)

    def forward(self, states: Tensor) -> Tensor:
        """``states [b, h]`` -> float32 ``[b, labels]``; the product is in float32 whatever the weights' type."""
        return F.linear(states.float(), self.weight.float())


class SequenceClassifier(nn.Module):
    """A GPT with a class score read from the state of each text's last token.

    The same function as transformers' ``GPT2ForSequenceClassification`` and ``LlamaForSequenceClassification``: texts
    are padded on the right and, attention being causal, what stands behind a text cannot change its state.

    Args:
        gpt: the backbone, taken over; it loses an output layer of its own.
        num_labels: classes, at least 2.
        seed: of the initial ``score.weight``, which is a function of it alone; None leaves it unfilled.
    """

    def __init__(self, gpt: GPT, num_labels: int, *, seed: int | None) -> None:
        super().__init__()
        gpt.head.weight = None
        self.gpt, self.num_labels = gpt, num_labels
        model = gpt.config
        self.score = Score(model.hidden_size, num_labels, model.init_std, gpt.dtype, gpt.parallel.device)
        if seed is not None:
            initialize(self.score, gpt.parallel, seed, prefix="score.")

    @property
    def parallel(self) -> ParallelContext:
        return self.gpt.parallel

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Class scores, float32 ``[b, labels]``.

        Args:
            tokens: ``[b, s]``, padded on the right.
            lengths: ``[b]`` tokens of each text, at least 1.
        """
        hidden = self.gpt.hidden(tokens)
        rows = torch.arange(tokens.shape[0], device=tokens.device)
        return self.score(hidden[rows, lengths - 1])

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean cross entropy (float32, with gradient) and right answers, for a batch of ``tokens, lengths, labels``."""
        logits = self(batch["tokens"], batch["lengths"])
        right = (logits.detach().argmax(-1) == batch["labels"]).sum()
        return F.cross_entropy(logits, batch["labels"]), right
