"""Windows score every token exactly once with as much context as promised."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlm_cli.evaluation.windows import batch_windows, padded_length, plan_windows


@given(st.integers(0, 200), st.integers(1, 40), st.data())
def test_every_token_once_with_its_context(num_tokens: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    windows = list(plan_windows(0, num_tokens, length, stride))
    scored = [target for window in windows for target in range(window.score + 1, window.end + 1)]
    assert scored == list(range(1, num_tokens))
    for window in windows:
        assert window.begin % stride == 0 and 0 < window.end - window.begin <= length
        for target in range(window.score + 1, window.end + 1):
            context = target - window.begin
            assert context >= min(target, length - stride + 1)


def test_as_in_the_published_recipe() -> None:
    """The loop of Hugging Face's "Perplexity of fixed-length models", whose windows hold one input more."""
    num_tokens, max_length, stride = 1000, 128, 50
    expected, previous = [], 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + max_length, num_tokens)
        expected.append((begin, end, end - previous))
        previous = end
        if end == num_tokens:
            break
    windows = list(plan_windows(0, num_tokens, max_length - 1, stride))
    found = [(w.begin, w.end + 1, w.end - w.score + (1 if w.begin == 0 else 0)) for w in windows]
    assert found == expected


def test_stride_out_of_range() -> None:
    for stride in (0, 17):
        with pytest.raises(ValueError, match="outside"):
            list(plan_windows(0, 100, 16, stride))


def test_few_shapes() -> None:
    assert {padded_length(n, 100) for n in range(1, 101)} == {16, 32, 64, 100}
    assert all(n <= padded_length(n, 100) for n in range(1, 101))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_hold_each_window_once(batch_size: int) -> None:
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 99, n) for n in rng.integers(0, 150, 20)]
    windows = [w for d, text in enumerate(texts) for w in plan_windows(d, len(text), 32, 20)]
    seen: list[int] = []
    scored = 0
    for batch in batch_windows(texts, windows, batch_size=batch_size, length=32):
        seen += batch.numbers.tolist()
        scored += int(batch.scored.sum())
        assert batch.tokens.shape == batch.labels.shape == batch.scored.shape
        for row, number in enumerate(batch.numbers):
            window = windows[number]
            places = np.flatnonzero(batch.scored[row])
            assert np.array_equal(batch.labels[row, places], texts[window.document][window.begin + places + 1])
            assert np.array_equal(
                batch.tokens[row, : len(places)], texts[window.document][window.begin :][: len(places)]
            )
    assert sorted(seen) == list(range(len(windows)))
    assert scored == sum(max(len(text) - 1, 0) for text in texts)
