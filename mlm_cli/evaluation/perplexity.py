"""Perplexity of held-out text per token, word and byte, with standard errors.

The number does not depend on the tensor size, the batch size or the number of data ranks beyond float32 rounding inside
the model (1e-6 relative): losses are added up in float64, in the order of the windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mlm_cli.config.shapes import turns_by_length
from mlm_cli.errors import DataError, UsageError
from mlm_cli.evaluation.documents import Document
from mlm_cli.evaluation.results import TaskResult
from mlm_cli.evaluation.windows import Window, batch_windows, plan_windows

if TYPE_CHECKING:
    from torch import Tensor

    from mlm_cli.config.schema import ModelSection
    from mlm_cli.parallel.context import ParallelContext

VERSION = 1


class ScoringModel(Protocol):
    """What is needed of a causal language model (``models.gpt.GPT``)."""

    config: ModelSection
    vocab_size: int
    parallel: ParallelContext

    def token_losses(self, tokens: Tensor, labels: Tensor, *, positions: Tensor | None = None) -> Tensor: ...


def padded_losses(model: ScoringModel, tokens: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
    """``token_losses`` of windows padded on the right, as of each by itself; all ``[b, s]``, see ``WindowBatch``."""
    return model.token_losses(tokens, labels, positions=positions if turns_by_length(model.config) else None)


@dataclass(frozen=True)
class Tally:
    """Negative log-likelihood (nats) and scored tokens of each window, and the document each belongs to."""

    nll: np.ndarray
    tokens: np.ndarray
    document: np.ndarray


def score_documents(
    model: ScoringModel,
    documents: Sequence[Document],
    *,
    length: int,
    stride: int | None = None,
    prefix: int | None = None,
    batch_size: int = 8,
    on_batch: Callable[[int, int], None] | None = None,
) -> Tally:
    """Score every token of every document once. All ranks call; data ranks share the windows.

    Args:
        length: tokens of context.
        stride: tokens between windows; None: ``length``, without overlap.
        prefix: id put before each document, so that its first token is scored too (as training data has an
            end-of-document id there); None: the first token of a document is context only.
        on_batch: told (batches done, batches in all) of this rank.

    Raises:
        UsageError: a stride outside [1, length].
        DataError: a token id outside the vocabulary, or nothing to score.
    """
    return score_rows(
        lambda *windows: padded_losses(model, *windows)[None],
        1,
        model.parallel,
        model.vocab_size,
        documents,
        length=length,
        stride=stride,
        prefix=prefix,
        batch_size=batch_size,
        on_batch=on_batch,
    )[0]


def score_rows(
    losses_of: Callable[[Tensor, Tensor, Tensor], Tensor],
    num_rows: int,
    parallel: ParallelContext,
    vocab_size: int,
    documents: Sequence[Document],
    *,
    length: int,
    stride: int | None,
    prefix: int | None,
    batch_size: int,
    on_batch: Callable[[int, int], None] | None,
) -> list[Tally]:
    """As ``score_documents``, for ``num_rows`` models at once: a tally each.

    Args:
        losses_of: ``tokens, labels, positions [b, s]`` -> losses ``[num_rows, b, s]``.
    """
    import torch

    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise UsageError(f"stride {stride} is outside 1 .. {length}", hint="it is at most the model's seq_length")
    head = [] if prefix is None else [prefix]
    texts = [np.concatenate([np.array(head, dtype=np.int64), document.ids]) for document in documents]
    largest = max((int(text.max()) for text in texts if len(text)), default=0)
    if largest >= vocab_size:
        raise DataError(f"token id {largest} is not in the model's vocabulary of {vocab_size:,}")
    windows = [w for number, text in enumerate(texts) for w in plan_windows(number, len(text), length, stride)]
    if not windows:
        raise DataError("no token can be scored: every document is too short")
    nll = torch.zeros(num_rows, len(windows), dtype=torch.float64)
    data, device = parallel.data, parallel.device
    batches = list(batch_windows(texts, windows, batch_size=batch_size, length=length))[data.rank :: data.size]
    for done, batch in enumerate(batches, 1):
        arrays = (batch.tokens, batch.labels, batch.positions)
        losses = losses_of(*(torch.from_numpy(array).to(device) for array in arrays))
        nll[:, batch.numbers] = torch.where(torch.from_numpy(batch.scored), losses.cpu().double(), 0.0).sum(-1)
        if on_batch is not None:
            on_batch(done, len(batches))
    nll = data.all_reduce_(nll.to(device)).cpu()
    return [Tally(row.numpy(), *_bookkeeping(windows)) for row in nll]


def _bookkeeping(windows: Sequence[Window]) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.array([window.end - window.score for window in windows], dtype=np.int64)
    return tokens, np.array([window.document for window in windows], dtype=np.int64)


def relative_error_of_total(tally: Tally, weights: np.ndarray | None = None) -> tuple[float, str] | None:
    """Standard error of the mean loss per unit of weight, and what was taken as independent.

    The estimator of a ratio of sums over independent documents (Cochran, "Sampling Techniques", 1977, section 2.11):
    with loss l_d and weight w_d of n documents and R = sum l / sum w, its variance is
    n/(n-1) * sum (l_d - R w_d)^2 / (sum w)^2. With a single document its windows take the place of documents.

    Args:
        weights: per document (words or bytes); None: scored tokens.
    """
    num_documents = int(tally.document.max()) + 1
    losses = np.bincount(tally.document, tally.nll, num_documents)
    units = "documents"
    counts = np.bincount(tally.document, tally.tokens, num_documents).astype(float)
    scale = 1.0
    if weights is not None:
        counts = np.asarray(weights, dtype=float)
    if num_documents < 2:
        # Words and bytes of a window are not known: taken in proportion to its tokens.
        scale = tally.tokens.sum() / counts.sum()
        losses, counts, units = tally.nll, tally.tokens.astype(float), "windows"
    n = len(losses)
    if n < 2 or counts.sum() == 0:
        return None
    residual = losses - losses.sum() / counts.sum() * counts
    return scale * math.sqrt(n / (n - 1) * float((residual**2).sum())) / counts.sum(), units


def perplexity_metrics(tally: Tally, documents: Sequence[Document]) -> tuple[dict[str, float], dict[str, float | None]]:
    """(metrics, their standard errors; None where there is none). Names and definitions of lm-evaluation-harness.

    ``loss`` is in nats a scored token; ``X_perplexity`` is exp(total loss / number of X); ``bits_per_byte`` is
    total loss / (bytes * ln 2). Errors of exponentials are by the delta method.
    """
    total = float(tally.nll.sum())
    num_tokens = int(tally.tokens.sum())
    metrics: dict[str, float] = {"loss": total / num_tokens, "token_perplexity": _exp(total / num_tokens)}
    error = relative_error_of_total(tally)
    errors: dict[str, float | None] = {
        "loss": error and error[0],
        "token_perplexity": error and error[0] * metrics["token_perplexity"],
    }
    for unit, name in (("words", "word_perplexity"), ("bytes", "byte_perplexity")):
        counts = [getattr(document, unit) for document in documents]
        if None in counts or sum(counts) == 0:
            continue
        rate = total / sum(counts)
        error = relative_error_of_total(tally, np.array(counts[: int(tally.document.max()) + 1]))
        metrics[name] = _exp(rate)
        errors[name] = error and error[0] * metrics[name]
        if unit == "bytes":
            metrics["bits_per_byte"] = rate / math.log(2)
            errors["bits_per_byte"] = error and error[0] / math.log(2)
    return metrics, errors


def _exp(value: float) -> float:
    """Of an untrained model on few words the perplexity can pass what a float holds."""
    return math.exp(value) if value < 709 else math.inf


def perplexity_result(
    tally: Tally, documents: Sequence[Document], *, name: str, config: dict[str, object]
) -> TaskResult:
    """The task's entry of ``results.json``."""
    metrics, errors = perplexity_metrics(tally, documents)
    estimate = relative_error_of_total(tally)
    totals = {
        "num_documents": len(documents),
        "num_scored_tokens": int(tally.tokens.sum()),
        "num_tokens": int(sum(len(document.ids) for document in documents)),
        "num_words": _total([document.words for document in documents]),
        "num_bytes": _total([document.bytes for document in documents]),
        "stderr_over": estimate[1] if estimate else None,
    }
    return TaskResult(
        name=name,
        metrics=metrics,
        stderr=errors,
        higher_is_better=dict.fromkeys(metrics, False),
        config={**config, **totals},
        version=VERSION,
        num_samples=len(documents),
        num_original=len(documents),
    )


def _total(counts: Sequence[int | None]) -> int | None:
    return None if None in counts else sum(count for count in counts if count is not None)
