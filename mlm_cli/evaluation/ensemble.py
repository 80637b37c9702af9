"""Several models as one: the mean of the probabilities they give (the linear opinion pool of Stone 1961).

Of a language model that is the mean probability of each next token; it needs no logits of whole vocabularies, since the
mean concerns the probability of the token that came. Of a classifier it is the mean probability of each class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mlm_cli import heartbeat
from mlm_cli.errors import UsageError
from mlm_cli.evaluation.documents import Document
from mlm_cli.evaluation.perplexity import ScoringModel, Tally, score_rows
from mlm_cli.tasks.classification import Features, confusion_matrix, evaluation_batches

if TYPE_CHECKING:
    from torch import Tensor

    from mlm_cli.data.tokenizer import Tokenizer
    from mlm_cli.parallel.context import ParallelContext


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

    def rows(tokens: Tensor, labels: Tensor) -> Tensor:
        alone = torch.stack([model.token_losses(tokens, labels).double() for model in models])
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


@torch.no_grad()
def class_probabilities(
    model: Any,
    features: Features,
    parallel: ParallelContext,
    *,
    num_labels: int,
    pad_id: int,
    batch_size: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Probabilities of the classes, float64 ``[examples, labels]``, equal on all ranks. All ranks call.

    Args:
        on_batch: told (examples done, examples in all) of this rank.
    """
    model.eval()
    device, data = parallel.device, parallel.data
    found = torch.zeros(len(features), num_labels, dtype=torch.float64, device=device)
    done, mine = 0, -(-len(features) // data.size)
    for batch in evaluation_batches(
        features, pad_id=pad_id, batch_size=batch_size, data_rank=data.rank, data_size=data.size
    ):
        logits = model(batch["tokens"].to(device), batch["lengths"].to(device))
        found[batch["sample_ids"].to(device)] = logits.double().softmax(-1)
        done += len(logits)
        heartbeat.beat()
        if on_batch is not None:
            on_batch(done, mine)
    return data.all_reduce_(found).cpu().numpy()


def confusion_and_loss(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, float]:
    """(confusion matrix int64 [label, prediction], mean cross entropy) of probabilities ``[examples, classes]``."""
    num_labels = probabilities.shape[1]
    confusion = confusion_matrix(probabilities.argmax(1), labels, num_labels)
    right = probabilities[np.arange(len(labels)), labels]
    return confusion, float(-np.log(np.maximum(right, np.finfo(np.float64).tiny)).mean())
