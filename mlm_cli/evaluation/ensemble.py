"""Several models as one: the mean of the probabilities they give (the linear opinion pool of Stone 1961).

Of a language model that is the mean probability of each next token; it needs no logits of whole vocabularies, since the
mean concerns the probability of the token that came. Of a classifier it is the mean probability of each class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from mlm_cli.errors import UsageError
from mlm_cli.evaluation.documents import Document
from mlm_cli.evaluation.perplexity import ScoringModel, Tally, padded_losses, score_rows

if TYPE_CHECKING:
    from torch import Tensor

    from mlm_cli.data.tokenizer import Tokenizer


def check_same_tokenizer(tokenizers: Mapping[str, Tokenizer]) -> None:
    """Refuse language models (by name) whose tokens are not the same: their probabilities are of different things.

    Raises:
        UsageError: naming the first that differs.
    """
    (first, reference), *others = tokenizers.items()
    for name, tokenizer in others:
        if tokenizer.fingerprint != reference.fingerprint:
            raise UsageError(
                f"{name} has another tokenizer ({tokenizer.vocab_size:,} tokens) than {first} "
                f"({reference.vocab_size:,}): next-token probabilities cannot be averaged",
                hint="average models that share a tokenizer; classifiers need not",
            )


def mean_token_losses(losses: Tensor) -> Tensor:
    """Negative log of the mean probability: ``losses [models, ...]`` in nats -> ``[...]``."""
    return math.log(losses.shape[0]) - torch.logsumexp(-losses, 0)


def score_ensemble(
    models: Sequence[ScoringModel],
    documents: Sequence[Document],
    *,
    length: int,
    stride: int | None = None,
    prefix: int | None = None,
    batch_size: int = 8,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[Tally]:
    """The tally of the ensemble, then those of its members alone, all in one pass. All ranks call.

    Arguments and errors as ``perplexity.score_documents``.
    """

    def rows(tokens: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        alone = torch.stack([padded_losses(model, tokens, labels, positions).double() for model in models])
        return torch.cat([mean_token_losses(alone)[None], alone])

    return score_rows(
        rows,
        1 + len(models),
        models[0].parallel,
        min(model.vocab_size for model in models),
        documents,
        length=length,
        stride=stride,
        prefix=prefix,
        batch_size=batch_size,
        on_batch=on_batch,
    )


def order_of_labels(labels: Sequence[str], reference: Sequence[str], names: tuple[str, str]) -> list[int]:
    """Where each label of ``reference`` stands in ``labels``.

    Args:
        names: of the models that ``labels`` and ``reference`` are of.

    Raises:
        UsageError: the two do not tell the same classes apart.
    """
    if set(labels) != set(reference):
        raise UsageError(
            f"{names[0]} tells {', '.join(sorted(labels))} apart, {names[1]} {', '.join(sorted(reference))}: "
            "their class probabilities cannot be averaged",
            hint="average classifiers of one task",
        )
    return [list(labels).index(label) for label in reference]
