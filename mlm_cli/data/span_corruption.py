"""T5's objective: spans of a text are replaced by sentinels, and the target spells them out.

Raffel et al. 2020 (https://arxiv.org/abs/1910.10683), section 3.1.4, as the authors' ``t5/data/preprocessors.py``:
``random_spans_helper`` (lengths), ``random_spans_noise_mask`` (which tokens), ``noise_span_to_unique_sentinel`` and
``nonnoise_span_to_unique_sentinel`` (inputs and targets).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mlm_cli.data.order import derive_key, draws

if TYPE_CHECKING:
    from mlm_cli.config.schema import ModelSection, SpanCorruptionSection


@dataclass(frozen=True)
class SpanLengths:
    """Sizes of a sample: ``raw`` tokens of text give ``inputs`` and ``targets``, each with its end-of-text token."""

    raw: int
    inputs: int
    targets: int
    num_noise: int
    num_spans: int


def span_lengths(raw: int, probability: float, mean_length: float) -> SpanLengths:
    """What ``raw`` >= 2 tokens of text come to."""
    num_noise = min(max(_round(raw * probability), 1), raw - 1)
    # each span has a token before it that is kept
    num_spans = min(max(_round(num_noise / mean_length), 1), num_noise, raw - num_noise)
    return SpanLengths(raw, raw - num_noise + num_spans + 1, num_noise + num_spans + 1, num_noise, num_spans)


def lengths_for(seq_length: int, probability: float, mean_length: float) -> SpanLengths:
    """The longest text whose inputs fill ``seq_length``, so that nothing is padded (T5's ``random_spans_helper``).

    Raises:
        ValueError: seq_length below 4, where not one span fits.
    """
    if seq_length < 4:
        raise ValueError(f"inputs of {seq_length} tokens cannot hold a masked span")
    low, high = 2, 3
    while span_lengths(high, probability, mean_length).inputs <= seq_length:
        low, high = high, 2 * high
    while high - low > 1:  # the size of the inputs never falls as the text grows
        middle = (low + high) // 2
        low, high = (
            (middle, high) if span_lengths(middle, probability, mean_length).inputs <= seq_length else (low, middle)
        )
    return span_lengths(low, probability, mean_length)


def with_targets(model: ModelSection, section: SpanCorruptionSection) -> ModelSection:
    """The model section with ``decoder_seq_length`` filled in for T5: the size of a sample's target."""
    if model.family != "t5" or model.decoder_seq_length is not None or model.seq_length < 4:
        return model
    targets = lengths_for(model.seq_length, section.probability, section.mean_length).targets
    return model.model_copy(update={"decoder_seq_length": targets})


def noise_mask(lengths: SpanLengths, key: int) -> np.ndarray:
    """Bool [raw]: which tokens are masked. Kept and masked runs take turns, beginning with a kept one.

    Both kinds are cut into ``num_spans`` runs of at least one token, every way of cutting as likely as any other.
    """
    masked = _segments(lengths.num_noise, lengths.num_spans, derive_key(key, 0))
    kept = _segments(lengths.raw - lengths.num_noise, lengths.num_spans, derive_key(key, 1))
    sizes = np.empty(2 * lengths.num_spans, dtype=np.int64)
    sizes[0::2], sizes[1::2] = kept, masked
    return np.repeat(np.arange(len(sizes)) % 2 == 1, sizes)


def _segments(size: int, count: int, key: int) -> np.ndarray:
    """``count`` positive sizes that add up to ``size``: count - 1 of the size - 1 places between items are cuts."""
    places = np.sort(np.argsort(draws(key, size - 1))[: count - 1]) + 1
    return np.diff(places, prepend=0, append=size)


def corrupt(tokens: np.ndarray, mask: np.ndarray, sentinels: np.ndarray, eos: int) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets) of a text.

    Args:
        tokens: int64 [raw]; mask: bool [raw], beginning with False and ending with True, see ``noise_mask``.
        sentinels: ids in the order of use.
        eos: ends both.
    """
    return _replaced(tokens, mask, sentinels, eos), _replaced(tokens, ~mask, sentinels, eos)


def _replaced(tokens: np.ndarray, gone: np.ndarray, sentinels: np.ndarray, eos: int) -> np.ndarray:
    """The tokens with each run of ``gone`` ones replaced by the next sentinel, and ``eos``."""
    first = gone.copy()
    first[1:] &= ~gone[:-1]
    out = tokens.copy()
    out[first] = sentinels[: int(first.sum())]
    return np.append(out[~gone | first], eos)


def _round(number: float) -> int:
    return int(np.round(number))  # half to even, as the original
