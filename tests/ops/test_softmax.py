from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mlm_cli import ops
from mlm_cli.ops import reference, registry
from mlm_cli.ops.softmax import scaled_causal_softmax, scaled_masked_softmax, softmax_gradient
from tests.ops.oracle import DTYPES, NAMES, assert_close, kernels, random, with_gradients  # noqa: F401

SHAPES = [(3, 1), (1, 2), (5, 7), (2, 3, 16, 16), (4, 33), (2, 2, 65, 127), (130, 257), (3, 4099), (1, 131072), (0, 9)]


def _agrees(got_function: object, want_function: object, scores: Tensor, grad: Tensor, scale: float) -> None:
    results, grads = with_gradients(got_function, [scores], [grad])
    wanted, want_grads = with_gradients(want_function, [scores.double()], [grad.double()])
    # exp magnifies the rounding of a score of size |x| by |x|
    steep = 1 + float((scores.double().abs() * abs(scale)).nan_to_num(0, 0, 0).amax()) if scores.numel() else 1.0
    assert_close(results[0], wanted[0], slack=8 * steep, size=wanted[0].abs())
    probs = results[0].double()  # the backward pass knows the probabilities as they were stored
    g = grad.double()
    wanted_grad = probs * (g - (g * probs).sum(-1, keepdim=True)) * scale
    assert_close(grads[0], wanted_grad, size=4 * abs(scale))
    loose = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3, torch.float64: 1e-9}[scores.dtype]
    torch.testing.assert_close(grads[0].double(), want_grads[0], rtol=loose, atol=loose * abs(scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mask_kind", ["none", "bool", "additive", "additive_same", "rows", "keys"])
def test_masked_softmax_agrees_with_float64(mask_kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scores, grad = random(*shape, dtype=dtype, scale=3.0), random(*shape, dtype=dtype)
    mask = {
        "none": lambda: None,
        "bool": lambda: torch.rand(shape) < 0.4,
        "additive": lambda: torch.randn(shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32),
        "additive_same": lambda: torch.randn(shape).to(dtype),
        "rows": lambda: torch.rand(*shape[:-1], 1) < 0.3,
        "keys": lambda: torch.rand(shape[-1]) < 0.5,
    }[mask_kind]()
    _agrees(
        lambda x: ops.scaled_masked_softmax(x, mask, 0.7),
        lambda x: reference.scaled_masked_softmax(x, mask, 0.7, 0.0),
        scores,
        grad,
        0.7,
    )
    if mask is not None and mask.dtype == torch.bool and scores.numel():
        hidden = mask.expand(shape)
        out = ops.scaled_masked_softmax(scores, mask, 0.7)
        assert (out[hidden] == 0).all()


@pytest.mark.parametrize(
    "mask_shape", [(1, 1, 1, 9), (2, 1, 1, 9), (1, 1, 5, 9), (2, 1, 5, 9), (2, 3, 5, 1), (5, 9), (9,), ()]
)
def test_masks_broadcast_as_torch_does(mask_shape: tuple[int, ...]) -> None:
    scores = random(2, 3, 5, 9)
    hidden = torch.rand(mask_shape) < 0.5
    added = torch.randn(mask_shape)
    for mask in (
        hidden,
        added,
        added.double(),
        added.bfloat16(),
        hidden.float().mul(-math.inf).nan_to_num(0, 0, -math.inf),
    ):
        want = reference.scaled_masked_softmax(scores.double(), mask, 1.0, 0.0)
        torch.testing.assert_close(ops.scaled_masked_softmax(scores, mask).double(), want, rtol=1e-5, atol=1e-6)
    strided = (torch.rand(9, 5, 3, 2) < 0.5).permute(3, 2, 1, 0)
    torch.testing.assert_close(
        ops.scaled_masked_softmax(scores, strided),
        ops.scaled_masked_softmax(scores, strided.contiguous()),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(
    "queries,keys,offset,window",
    [
        (8, 8, 0, None),
        (1, 1, 0, None),
        (65, 65, 0, None),
        (1, 100, 99, None),
        (7, 50, 43, None),
        (33, 129, 40, 17),
        (40, 40, 0, 1),
        (40, 40, -5, None),
        (20, 10, 0, None),
        (16, 200, 500, None),
        (16, 20, 500, 4),
        (3, 5000, 4000, None),
    ],
)
def test_causal_softmax_agrees_with_float64(
    queries: int, keys: int, offset: int, window: int | None, dtype: torch.dtype
) -> None:
    scores, grad = random(2, 3, queries, keys, dtype=dtype, scale=3.0), random(2, 3, queries, keys, dtype=dtype)
    _agrees(
        lambda x: ops.scaled_causal_softmax(x, 0.5, offset=offset, window=window),
        lambda x: reference.scaled_causal_softmax(x, 0.5, offset, window, 0.0),
        scores,
        grad,
        0.5,
    )
    hidden = reference.causal_hidden(queries, keys, offset, window, scores.device)
    leaf = scores.clone().requires_grad_()
    out = ops.scaled_causal_softmax(leaf, 0.5, offset=offset, window=window)
    (dx,) = torch.autograd.grad(out, leaf, grad)
    assert (out[..., hidden] == 0).all() and (dx[..., hidden] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=NAMES.get)
def test_extremes(dtype: torch.dtype) -> None:
    keys = 300
    rows = torch.randn(8, keys)
    rows[0] *= 1e4
    rows[1] = -math.inf
    rows[2, 1:] = -math.inf
    rows[3] = 1e4
    rows[4] = 1e-40
    rows[5, 7] = 6e4
    rows[6] = torch.linspace(-95, 0, keys)
    scores = rows.to(dtype)
    leaf = scores.clone().requires_grad_()
    out = ops.scaled_masked_softmax(leaf)
    want = reference.scaled_masked_softmax(scores.double(), None, 1.0, 0.0)
    tiny = 2.0**-25 if dtype == torch.float16 else 1e-30  # half of the smallest step near zero
    torch.testing.assert_close(out.double(), want, rtol=2e-2 if dtype != torch.float32 else 2e-5, atol=tiny)
    assert (out[1] == 0).all() and out[2, 0] == 1
    (dx,) = torch.autograd.grad(out, leaf, torch.randn(8, keys).to(dtype))
    assert torch.isfinite(dx).all() and (dx[1] == 0).all()
    rows[0, 3] = math.nan
    assert ops.scaled_masked_softmax(rows.to(dtype))[0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_a_row_with_every_key_hidden_is_zero_in_value_and_gradient(dtype: torch.dtype) -> None:
    scores = random(2, 4, 33, dtype=dtype).requires_grad_()
    mask = torch.zeros(2, 4, 33, dtype=torch.bool)
    mask[0, 2] = True
    additive = mask.to(torch.float32).masked_fill(mask, -math.inf)
    for m in (mask, additive):
        out = ops.scaled_masked_softmax(scores, m)
        (dx,) = torch.autograd.grad(out.sum() + out.square().sum(), scores)
        assert (out[0, 2] == 0).all() and (dx[0, 2] == 0).all()
        assert torch.isfinite(out).all() and torch.isfinite(dx).all()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    keys=st.integers(1, 200),
    shift=st.floats(-1e3, 1e3),
    hidden=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_rows_sum_to_one_and_do_not_see_a_shift(rows: int, keys: int, shift: float, hidden: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, keys, generator=generator) * 5
    mask = torch.rand(rows, keys, generator=generator) < hidden
    out = ops.scaled_masked_softmax(scores, mask)
    alive = ~mask.all(-1)
    torch.testing.assert_close(out.sum(-1), alive.float(), rtol=1e-5, atol=1e-5)
    assert (out[mask] == 0).all() and (out >= 0).all()
    moved = ops.scaled_masked_softmax(scores + shift, mask)
    torch.testing.assert_close(moved, out, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_dropout_of_probabilities(causal: bool) -> None:
    scores = random(3, 40, 90, dtype=torch.float64)

    def run(x: Tensor, p: float = 0.4) -> Tensor:
        torch.manual_seed(11)
        if causal:
            return ops.scaled_causal_softmax(x, 0.3, offset=50, dropout=p)
        return ops.scaled_masked_softmax(x, None, 0.3, p)

    whole, dropped = run(scores, 0.0), run(scores)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.6)
    share = kept[whole > 0].double().mean().item()
    assert abs(share - 0.6) < 0.02
    assert torch.equal(run(scores), dropped)
    small = random(2, 3, 11, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(run, (small,))


def test_gradients_by_finite_differences_and_of_an_additive_mask() -> None:
    scores, mask = (
        random(2, 4, 9, dtype=torch.float64).requires_grad_(),
        random(4, 9, dtype=torch.float64).requires_grad_(),
    )
    hidden = torch.rand(4, 9) < 0.3
    assert torch.autograd.gradcheck(lambda x: ops.scaled_masked_softmax(x, hidden, 0.5), (scores,))
    assert torch.autograd.gradcheck(lambda x: ops.scaled_causal_softmax(x, 0.5, offset=3, window=4), (scores,))
    assert torch.autograd.gradcheck(lambda x, m: ops.scaled_masked_softmax(x, m, 0.5), (scores, mask))


def test_strided_scores() -> None:
    base = random(6, 4, 30)
    for x in (base.transpose(0, 1), base[..., ::3], base[:, ::2]):
        assert torch.equal(ops.scaled_masked_softmax(x), ops.scaled_masked_softmax(x.contiguous()))
        assert torch.equal(ops.scaled_causal_softmax(x), ops.scaled_causal_softmax(x.contiguous()))


def test_reference_agrees_with_torch() -> None:
    scores, mask = random(2, 3, 17), torch.rand(2, 3, 17) < 0.3
    want = torch.softmax((scores * 0.5).masked_fill(mask, -math.inf), -1)
    torch.testing.assert_close(reference.scaled_masked_softmax(scores, mask, 0.5, 0.0), want)
    square = random(2, 6, 6)
    want = torch.softmax(square.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -math.inf), -1)
    torch.testing.assert_close(reference.scaled_causal_softmax(square, 1.0, 0, None, 0.0), want)


def test_bad_input_is_named() -> None:
    scores = torch.randn(2, 3, 8)
    with pytest.raises(RuntimeError, match="`mask` has size 7 where `scores` has 8"):
        ops.scaled_masked_softmax(scores, torch.zeros(7, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="`mask` must be bool or floating, got int64"):
        ops.scaled_masked_softmax(scores, torch.zeros(8, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="`mask` has 4 dimensions"):
        ops.scaled_masked_softmax(scores, torch.zeros(1, 2, 3, 8, dtype=torch.bool))
    with pytest.raises(RuntimeError, match=r"`scores` must be \[..., queries, keys\]"):
        ops.scaled_causal_softmax(torch.randn(8))
    with pytest.raises(ValueError, match="`window` must be at least 1"):
        ops.scaled_causal_softmax(scores, window=0)


@pytest.mark.parametrize("served", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("band", [None, (0, None), (3, 5)])
def test_gradient_without_autograd_is_that_of_autograd(
    band: tuple[int, int | None] | None, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = torch.randn(2, 3, 7, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores.requires_grad_()
    if band is None:
        probs, where = scaled_masked_softmax(scores, None, 0.3), {}
    else:
        where = {"offset": band[0], "window": band[1]}
        probs = scaled_causal_softmax(scores, 0.3, offset=band[0], window=band[1])
    grad = torch.randn(probs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (wanted,) = torch.autograd.grad(probs, scores, grad)
    if not served:
        monkeypatch.setattr(registry, "serves", lambda *_: False)
    torch.testing.assert_close(softmax_gradient(grad, probs.detach(), 0.3, **where), wanted, rtol=1e-12, atol=1e-12)
