"""Span corruption against the code of T5's authors (``t5/data/preprocessors.py``), written down here plainly."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlm_cli.data.order import mix
from mlm_cli.data.span_corruption import corrupt, lengths_for, noise_mask, span_lengths

EOS, SENTINELS = 1, np.arange(32_099, 31_999, -1)


def random_spans_helper(inputs_length: int, noise_density: float, mean_length: float) -> tuple[int, int]:
    """T5's: (tokens of text, tokens of the targets) for inputs of a length."""

    def sizes(tokens_length: int) -> tuple[int, int]:
        noise = round(tokens_length * noise_density)
        spans = round(noise / mean_length)
        return tokens_length - noise + spans + 1, noise + spans + 1

    tokens_length = inputs_length
    while sizes(tokens_length + 1)[0] <= inputs_length:
        tokens_length += 1
    return tokens_length, sizes(tokens_length)[1]


def test_lengths_of_the_t5_paper() -> None:
    lengths = lengths_for(512, 0.15, 3.0)
    assert (lengths.raw, lengths.inputs, lengths.targets) == (568, 512, 114)


@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.15, 2.0), (0.1, 5.0), (0.5, 3.0), (0.25, 10.0)])
def test_lengths_are_t5s_and_nothing_is_padded(density: float, mean: float) -> None:
    for seq_length in [*range(64, 200), 256, 512, 777, 1024, 2048]:
        lengths = lengths_for(seq_length, density, mean)
        assert (lengths.raw, lengths.targets) == random_spans_helper(seq_length, density, mean)
        assert lengths.inputs == seq_length


@given(st.integers(4, 300), st.floats(0.01, 0.9), st.floats(1, 12), st.integers(0, 2**64 - 1))
def test_inputs_and_targets_hold_the_text(seq_length: int, density: float, mean: float, key: int) -> None:
    """Putting the spans of the target where their sentinels stand gives the text back."""
    lengths = lengths_for(seq_length, density, mean)
    assert lengths.inputs <= seq_length < span_lengths(lengths.raw + 1, density, mean).inputs
    tokens = np.arange(lengths.raw) + 100
    sentinels = np.arange(10**6, 10**6 + lengths.num_spans)
    mask = noise_mask(lengths, key)
    assert mask.sum() == lengths.num_noise and not mask[0] and mask[-1]
    inputs, targets = corrupt(tokens, mask, sentinels, EOS)
    assert (len(inputs), len(targets)) == (lengths.inputs, lengths.targets)
    assert inputs[-1] == targets[-1] == EOS
    spans: dict[int, list[int]] = {}
    for token in targets[:-1].tolist():
        if token >= 10**6:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    assert list(spans) == sentinels.tolist() and all(spans.values())
    rebuilt = [piece for token in inputs[:-1].tolist() for piece in spans.get(token, [token])]
    assert rebuilt == tokens.tolist()


def test_an_example_of_the_paper() -> None:
    """Figure 2: "Thank you for inviting me to your party last week"."""
    text = np.array([11, 12, 13, 14, 15, 16, 17, 18, 19, 20])
    mask = np.isin(text, [13, 14, 19])
    inputs, targets = corrupt(text, mask, SENTINELS, EOS)
    assert inputs.tolist() == [11, 12, 32_099, 15, 16, 17, 18, 32_098, 20, EOS]
    # a last sentinel, as in the figure, because this text ends with a kept token; masks that are drawn end with a span
    assert targets.tolist() == [32_099, 13, 14, 32_098, 19, 32_097, EOS]


def test_every_way_of_cutting_is_as_likely() -> None:
    """Six kept and three masked tokens in two spans: 5 x 2 masks, each drawn as often as any other."""
    lengths = span_lengths(9, 0.34, 1.5)
    assert (lengths.num_noise, lengths.num_spans) == (3, 2)
    num = 5000
    counts = Counter(noise_mask(lengths, mix(key)).tobytes() for key in range(num))
    assert len(counts) == 10
    assert sum((count - num / 10) ** 2 / (num / 10) for count in counts.values()) < 33.7  # chi square, 9 degrees, 1e-4


def reference_mask(length: int, density: float, mean: float, rng: np.random.Generator) -> np.ndarray:
    """T5's ``random_spans_noise_mask``."""
    num_noise = min(max(round(length * density), 1), length - 1)
    num_spans = max(round(num_noise / mean), 1)

    def segmentation(num_items: int, num_segments: int) -> np.ndarray:
        first = np.arange(num_items - 1) < num_segments - 1
        rng.shuffle(first)
        segment = np.cumsum(np.pad(first, [[1, 0]]))
        return np.bincount(segment, minlength=num_segments)

    noise = segmentation(num_noise, num_spans)
    kept = segmentation(length - num_noise, num_spans)
    starts = np.cumsum(np.reshape(np.stack([kept, noise], axis=1), [num_spans * 2]))[:-1]
    indicator = np.zeros(length, dtype=bool)
    indicator[starts] = True
    return np.cumsum(indicator) % 2 == 1


def compare_with_t5(num: int) -> None:
    lengths, rng = lengths_for(128, 0.15, 3.0), np.random.default_rng(0)
    ours, theirs, places = Counter(), Counter(), np.zeros((2, lengths.raw))
    for key in range(num):
        for row, (sizes, mask) in enumerate(
            ((ours, noise_mask(lengths, mix(key))), (theirs, reference_mask(lengths.raw, 0.15, 3.0, rng)))
        ):
            edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
            spans = edges[1::2] - edges[::2]
            assert len(spans) == lengths.num_spans and spans.sum() == lengths.num_noise
            sizes.update(spans.tolist())
            places[row] += mask
    mean = sum(size * count for size, count in ours.items()) / sum(ours.values())
    assert mean == pytest.approx(lengths.num_noise / lengths.num_spans)
    for size in range(1, 9):
        assert abs(ours[size] - theirs[size]) < 6 * np.sqrt(ours[size] + theirs[size]), size
    assert (np.abs(places[0] - places[1]) < 6 * np.sqrt(places.sum(axis=0) + 1)).all()


def test_masks_are_distributed_as_t5s() -> None:
    compare_with_t5(3000)


@pytest.mark.slow
def test_masks_are_distributed_as_t5s_on_100_000_samples() -> None:
    compare_with_t5(100_000)
