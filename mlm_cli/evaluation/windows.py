"""How a document longer than the context is scored: overlapping windows, every token scored exactly once.

As in Hugging Face's "Perplexity of fixed-length models": windows begin every ``stride`` tokens and a token counts in
the first window that holds it, so all but a document's first tokens have at least ``length - stride`` of
context. What context a token has depends on its place alone, not on where the document ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Window:
    """Inputs ``[begin, end)`` of a document's tokens; input i predicts token i + 1. Inputs from ``score`` on count."""

    document: int
    begin: int
    end: int
    score: int


def plan_windows(document: int, num_tokens: int, length: int, stride: int) -> Iterator[Window]:
    """Windows over a document of ``num_tokens`` tokens, of which all but the first are to be predicted.

    Args:
        length: inputs a window.
        stride: tokens from one window's begin to the next's; ``length``: no overlap.
    """
    if not 1 <= stride <= length:
        raise ValueError(f"stride {stride} is outside [1, {length}]")
    scored = 0
    for begin in range(0, num_tokens - 1, stride):
        end = min(begin + length, num_tokens - 1)
        yield Window(document, begin, end, scored)
        scored = end
        if end == num_tokens - 1:
            return


def padded_length(num_inputs: int, length: int) -> int:
    """Short windows are padded to a power of two, so that few shapes occur and little is wasted."""
    size = 16
    while size < num_inputs:
        size *= 2
    return min(size, length)


@dataclass(frozen=True)
class WindowBatch:
    """Windows padded on the right to one shape [b, s]. ``numbers`` [b] are their places in the plan.

    ``positions`` [b, s]: padding stands where the last token of its window does, so that it makes no window longer.
    """

    numbers: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray
    labels: np.ndarray
    scored: np.ndarray


def batch_windows(
    texts: Sequence[np.ndarray], windows: Sequence[Window], *, batch_size: int, length: int
) -> Iterator[WindowBatch]:
    """Batches of at most ``batch_size`` windows of one padded length, in an order that depends on the plan alone."""
    sizes = np.array([padded_length(window.end - window.begin, length) for window in windows])
    order = np.argsort(-sizes, kind="stable")
    first = 0
    while first < len(order):
        size = int(sizes[order[first]])
        numbers = order[first : first + batch_size]
        numbers = numbers[sizes[numbers] == size]
        first += len(numbers)
        tokens = np.zeros((len(numbers), size), dtype=np.int64)
        labels, scored = np.zeros_like(tokens), np.zeros(tokens.shape, dtype=bool)
        positions = np.zeros_like(tokens)
        for row, number in enumerate(numbers):
            window = windows[number]
            text, used = texts[window.document], window.end - window.begin
            tokens[row, :used] = text[window.begin : window.end]
            labels[row, :used] = text[window.begin + 1 : window.end + 1]
            scored[row, window.score - window.begin : used] = True
            positions[row] = np.minimum(np.arange(size), used - 1)
        yield WindowBatch(numbers, tokens, positions, labels, scored)
