from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mlm_cli import ops
from mlm_cli.ops import reference
from tests.ops.oracle import DTYPES, NAMES, assert_close, kernels, random, with_gradients  # noqa: F401

SHAPES = [(5, 1), (3, 2), (4, 7), (9, 16), (33, 31), (70, 384), (130, 777), (6, 2048), (5, 4096), (3, 8193), (2, 65536)]
SHAPES += [(0, 16), (2, 3, 4, 48), (129,)]


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["layer_norm", "layer_norm_no_bias", "rms_norm"])
def test_norm_agrees_with_float64(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, grad = random(*shape, dtype=dtype), random(*shape, dtype=dtype)
    inputs = [x, random(shape[-1], dtype=dtype)]
    function, want_function = {
        "layer_norm": (ops.layer_norm, reference.layer_norm),
        "layer_norm_no_bias": (ops.layer_norm, reference.layer_norm),
        "rms_norm": (ops.rms_norm, reference.rms_norm),
    }[kind]
    if kind == "layer_norm":
        inputs.append(random(shape[-1], dtype=dtype))
    results, grads = with_gradients(function, inputs, [grad])
    wanted, want_grads = with_gradients(want_function, [t.double() for t in inputs], [grad.double()])
    assert results[0].dtype == dtype
    assert_close(results[0], wanted[0])
    rows = max(1, x.numel() // shape[-1])
    # A row of one or two numbers has next to no variance: 1 / sqrt(eps) = 316 magnifies every rounding of x.
    magnified = 400.0 if shape[-1] <= 2 else 1.0
    assert_close(grads[0], want_grads[0], slack=60, size=magnified * 4)
    for got, want in zip(grads[1:], want_grads[1:], strict=True):
        assert got.dtype == dtype
        assert_close(got, want, size=4 * magnified * max(1.0, float(rows) ** 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=NAMES.get)
@pytest.mark.parametrize("width", [1024, 4096], ids=str)
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm", "residual_norm"])
def test_results_stored_past_the_cache_are_the_same_bits(kind: str, width: int, dtype: torch.dtype) -> None:
    """From 32 MB on results go past the cache, several rows at once; pieces of the same rows do not."""
    rows = (33 << 20) // (width * dtype.itemsize) | 3  # some are left over by groups of two and four
    x, grad, weight = random(rows, width, dtype=dtype), random(rows, width, dtype=dtype), random(width, dtype=dtype)

    def run(rows_of_x: Tensor, rows_of_grad: Tensor) -> list[Tensor]:
        leaf = rows_of_x.clone().requires_grad_()
        if kind == "residual_norm":
            results = ops.residual_norm(leaf, rows_of_x.flip(-1), weight)
        else:
            results = (getattr(ops, kind)(leaf, weight),)
        (leaf_grad,) = torch.autograd.grad(results, leaf, [rows_of_grad] * len(results))
        return [*results, leaf_grad]

    whole = run(x, grad)
    pieces = [run(*rows_of) for rows_of in zip(x.split(rows // 5), grad.split(rows // 5), strict=True)]
    for found, *parts in zip(whole, *pieces, strict=True):
        assert torch.equal(found, torch.cat(parts))


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 7), (67, 384), (9, 3, 130), (2, 4097), (0, 8)], ids=str)
def test_residual_norm_agrees_with_float64(
    shape: tuple[int, ...], with_bias: bool, kind: str, dtype: torch.dtype
) -> None:
    x, residual, grad, grad_total = (random(*shape, dtype=dtype) for _ in range(4))
    weight, bias, norm_bias = (random(shape[-1], dtype=dtype) for _ in range(3))
    leaves = [t.clone().requires_grad_() for t in (x, residual, weight, bias, norm_bias)]
    normed, total = ops.residual_norm(
        leaves[0],
        leaves[1],
        leaves[2],
        leaves[4] if kind == "layernorm" else None,
        bias=leaves[3] if with_bias else None,
        kind=kind,
    )
    used = [
        leaf for leaf in leaves if (leaf is not leaves[3] or with_bias) and (leaf is not leaves[4] or kind != "rmsnorm")
    ]
    got = dict(zip(map(id, used), torch.autograd.grad([normed, total], used, [grad, grad_total]), strict=True))

    branch = x.double() + bias.double() if with_bias else x.double()
    assert_close(total, branch + residual.double())
    # The norm is of the sum as it was stored, rounded to its dtype.
    stored, wide_weight, wide_bias = (t.detach().double().requires_grad_() for t in (total, weight, norm_bias))
    if kind == "layernorm":
        want, params = reference.layer_norm(stored, wide_weight, wide_bias), [stored, wide_weight, wide_bias]
    else:
        want, params = reference.rms_norm(stored, wide_weight), [stored, wide_weight]
    assert_close(normed, want.detach())
    grads = torch.autograd.grad(want, params, grad.double())
    d_total = grads[0] + grad_total.double()
    assert_close(got[id(leaves[0])], d_total, slack=80)
    assert_close(got[id(leaves[1])], d_total, slack=80)
    size = 4.0 * max(1, x.numel() // shape[-1]) ** 0.5
    assert_close(got[id(leaves[2])], grads[1], size=size)
    if with_bias:
        assert_close(got[id(leaves[3])], d_total.reshape(-1, shape[-1]).sum(0), size=size, slack=80)
    if kind == "layernorm":
        assert_close(got[id(leaves[4])], grads[2], size=size)


def test_one_unused_result_of_residual_norm_is_a_zero_gradient() -> None:
    x, residual = (random(6, 24, dtype=torch.float64).requires_grad_() for _ in range(2))
    weight, bias = random(24, dtype=torch.float64), random(24, dtype=torch.float64)
    for pick in (0, 1):
        got = torch.autograd.grad(ops.residual_norm(x, residual, weight, bias)[pick].square().sum(), [x, residual])
        other = reference.residual_norm(x, residual, weight, bias, None, 1e-5, 0.0, "layernorm")[pick]
        want = torch.autograd.grad(other.square().sum(), [x, residual])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def _dropped(x: Tensor, p: float) -> tuple[Tensor, Tensor, Tensor]:
    residual, weight = torch.zeros_like(x), torch.ones(x.shape[-1], dtype=x.dtype)
    leaf = x.clone().requires_grad_()
    normed, total = ops.residual_norm(leaf, residual, weight, dropout=p, kind="rmsnorm")
    (grad,) = torch.autograd.grad(total, leaf, torch.ones_like(total))
    return normed, total.detach(), grad


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_the_backward_pass_makes_the_same_mask(p: float) -> None:
    x = torch.ones(300, 333)
    _, total, grad = _dropped(x, p)
    kept = total != 0
    assert abs(kept.double().mean().item() - (1 - p)) < 4 * (p * (1 - p) / x.numel()) ** 0.5
    torch.testing.assert_close(total[kept], torch.full_like(total[kept], 1 / (1 - p)))
    assert torch.equal(grad, total)
    # no two rows or columns alike
    assert len({tuple(row.tolist()) for row in kept[:50, :64]}) == 50
    assert abs(kept.double().mean(0) - (1 - p)).max() < 6 * (p * (1 - p) / 300) ** 0.5


def test_dropout_follows_torchs_generator() -> None:
    x = torch.randn(50, 65)
    torch.manual_seed(7)
    first, second = _dropped(x, 0.3)[1], _dropped(x, 0.3)[1]
    torch.manual_seed(7)
    assert torch.equal(_dropped(x, 0.3)[1], first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_extremes(dtype: torch.dtype) -> None:
    weight, bias = torch.ones(384, dtype=dtype), torch.zeros(384, dtype=dtype)
    rows = torch.randn(6, 384)
    rows[0] = 1e4 + torch.randn(384)  # a mean far above the spread
    rows[1] = 0.0
    rows[2] = 3.0  # no variance at all
    rows[3] = 1e-38  # close to the smallest normal number
    rows[4, 17] = 1e4  # one huge value
    rows[5] *= 1e-4
    x = rows.to(dtype)
    got = ops.layer_norm(x, weight, bias)
    assert_close(got[1:], reference.layer_norm(x.double(), weight.double(), bias.double())[1:])
    # float32 keeps the mean of 1e4 to 2^-24: 6e-4 of the spread
    assert_close(got[0], reference.layer_norm(x[0].double(), weight.double(), bias.double()), size=1e4)
    assert (got[1:3] == 0).all()
    assert_close(ops.rms_norm(x, weight), reference.rms_norm(x.double(), weight.double()))


def test_parameters_may_be_wider_than_the_input() -> None:
    x, weight, bias = random(40, 100, dtype=torch.bfloat16), torch.randn(100), torch.randn(100)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    out = ops.layer_norm(*leaves)
    grads = torch.autograd.grad(out.float().sum(), leaves)
    assert out.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    assert_close(out, reference.layer_norm(x.double(), weight.double(), bias.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_strided_input(dtype: torch.dtype) -> None:
    base = random(64, 6, 20, dtype=dtype)
    weight = random(20, dtype=dtype)
    for x in (base[::2], base[:, 1:5], base.transpose(0, 1), base[..., ::2].expand(64, 6, 10)):
        w = weight[: x.shape[-1]]
        torch.testing.assert_close(ops.rms_norm(x, w), ops.rms_norm(x.contiguous(), w), rtol=0, atol=0)


def test_gradients_by_finite_differences() -> None:
    x, residual = (random(3, 9, dtype=torch.float64).requires_grad_() for _ in range(2))
    weight, bias, norm_bias = (random(9, dtype=torch.float64).requires_grad_() for _ in range(3))
    assert torch.autograd.gradcheck(ops.layer_norm, (x, weight, bias))
    assert torch.autograd.gradcheck(ops.rms_norm, (x, weight))

    def residual_norm(x: Tensor, r: Tensor, w: Tensor, nb: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        return ops.residual_norm(x, r, w, nb, bias=b, dropout=0.25)

    assert torch.autograd.gradcheck(residual_norm, (x, residual, weight, norm_bias, bias))


def test_reference_agrees_with_torch() -> None:
    x, weight, bias = random(5, 33), random(33), random(33)
    torch.testing.assert_close(reference.layer_norm(x, weight, bias), F.layer_norm(x, (33,), weight, bias))
    torch.testing.assert_close(reference.rms_norm(x, weight), F.rms_norm(x, (33,), weight, 1e-5))


def test_bad_input_is_named() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(RuntimeError, match=r"`weight` must have shape \[8\]"):
        ops.layer_norm(x, torch.ones(7))
    with pytest.raises(RuntimeError, match="`x` must be float32, bfloat16, float16 or float64, got int64"):
        ops.rms_norm(torch.ones(4, 8, dtype=torch.int64), torch.ones(8))
    with pytest.raises(RuntimeError, match="`residual` must have the shape of `x`"):
        ops.residual_norm(x, torch.randn(4, 9), torch.ones(8))
    with pytest.raises(RuntimeError, match="`residual` must be float32 as `x`"):
        ops.residual_norm(x, x.bfloat16(), torch.ones(8))
    with pytest.raises(ValueError, match="`kind` must be one of"):
        ops.residual_norm(x, x, torch.ones(8), kind="batchnorm")
    with pytest.raises(RuntimeError, match=r"`dropout` must be in \[0, 1\), got 1"):
        ops.residual_norm(x, x, torch.ones(8), dropout=1.0)
