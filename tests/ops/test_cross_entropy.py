from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mlm_cli import ops
from tests.ops.oracle import NAMES, assert_close, kernels, random  # noqa: F401

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(
    "t,v,valid", [(1, 1, 1), (5, 7, 7), (33, 1000, 997), (3, 50304, 50257), (9, 4096, 2049), (0, 5, 5)]
)
def test_slices_of_a_vocabulary_give_torchs_cross_entropy(t: int, v: int, valid: int, dtype: torch.dtype) -> None:
    """The vocabulary in two slices, the second one padded: the loss and the gradient are those of the whole."""
    whole = random(t, valid, dtype=dtype, scale=4.0)
    labels = torch.randint(0, valid, (t,))
    first = valid // 2
    slices = [(whole[:, :first].clone(), 0, first)]
    padded = torch.full((t, v - first), 1e4, dtype=dtype)
    padded[:, : valid - first] = whole[:, first:]
    slices.append((padded, first, valid - first))

    stats = [ops.cross_entropy_stats(logits, labels, start, count) for logits, start, count in slices]
    top = torch.maximum(stats[0][0], stats[1][0])
    total = sum(s * torch.exp(m - top) for m, s, _ in stats)
    lse = top + total.log()
    target = stats[0][2] + stats[1][2]
    exact = whole.double().requires_grad_()
    losses = F.cross_entropy(exact, labels, reduction="none")
    torch.testing.assert_close((lse - target).double(), losses.detach(), rtol=1e-5, atol=1e-5)

    scale = torch.rand(t) / max(t, 1)
    (want,) = torch.autograd.grad((losses * scale.double()).sum(), exact)
    for logits, start, count in slices:
        assert ops.cross_entropy_grad_(logits, labels, lse, scale, start, count) is logits
        assert_close(logits[:, :count], want[:, start : start + count], size=float(scale.max()) if t else 1.0, slack=60)
        assert (logits[:, count:] == 0).all()


def test_labels_outside_the_slice_and_fully_hidden_rows() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [-torch.inf, -torch.inf, -torch.inf]])
    top, total, target = ops.cross_entropy_stats(logits, torch.tensor([-100, 0]), 0, 3)
    assert target[0] == 0 and total[1] == 0 and top[1] == -torch.inf
    top, total, target = ops.cross_entropy_stats(logits, torch.tensor([5, 4]), 4, 0)  # a slice of nothing but padding
    assert (total == 0).all() and (target == 0).all() and (top == -torch.inf).all()


def test_big_logits_stay_finite_and_rows_may_be_strided() -> None:
    buffer = torch.randn(6, 40) * 1e4
    logits, labels = buffer[:, :33], torch.randint(0, 33, (6,))
    top, total, target = ops.cross_entropy_stats(logits, labels, 0, 33)
    torch.testing.assert_close(top + total.log() - target, F.cross_entropy(logits, labels, reduction="none"))
    before = buffer[:, 33:].clone()
    ops.cross_entropy_grad_(logits, labels, top + total.log(), torch.ones(6), 0, 33)
    assert torch.isfinite(logits).all() and torch.equal(buffer[:, 33:], before)


def test_bad_input_is_named() -> None:
    logits, labels = torch.randn(4, 9), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="`num_valid` must be between 0 and 9, got 10"):
        ops.cross_entropy_stats(logits, labels, 0, 10)
    with pytest.raises(RuntimeError, match="`labels` must be int64, got int32"):
        ops.cross_entropy_stats(logits, labels.int(), 0, 9)
    with pytest.raises(RuntimeError, match=r"`logits` must be \[t, v\]"):
        ops.cross_entropy_stats(logits[None], labels, 0, 9)
    with pytest.raises(RuntimeError, match="columns next to each other"):
        ops.cross_entropy_stats(logits.t(), torch.zeros(9, dtype=torch.int64), 0, 4)
