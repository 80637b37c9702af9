from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mlm_cli import ops
from mlm_cli.ops import reference
from tests.ops.oracle import DTYPES, NAMES, assert_close, kernels, random, with_gradients  # noqa: F401

SHAPES = [(1, 1), (3, 5), (70, 64), (2, 9, 130), (40, 1537), (4, 16384), (0, 8), (4096,)]


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_bias_gelu_agrees_with_float64(with_bias: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = [random(*shape, dtype=dtype, scale=2.0)] + ([random(shape[-1], dtype=dtype)] if with_bias else [])
    grad = random(*shape, dtype=dtype)
    results, grads = with_gradients(ops.bias_gelu, inputs, [grad])
    wanted, want_grads = with_gradients(reference.bias_gelu, [t.double() for t in inputs], [grad.double()])
    assert_close(results[0], wanted[0], slack=12, size=4.0)
    assert_close(grads[0], want_grads[0], slack=80, size=4.0)
    if with_bias:
        rows = max(1, inputs[0].numel() // shape[-1])
        assert_close(grads[1], want_grads[1], size=4.0 * rows**0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("shape", [(1, 2), (3, 10), (70, 64), (2, 9, 130), (40, 1538), (0, 8), (24,)], ids=str)
def test_swiglu_agrees_with_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, grad = random(*shape, dtype=dtype, scale=2.0), random(*shape[:-1], shape[-1] // 2, dtype=dtype)
    results, grads = with_gradients(ops.swiglu, [x], [grad])
    wanted, want_grads = with_gradients(reference.swiglu, [x.double()], [grad.double()])
    assert_close(results[0], wanted[0], slack=12, size=4.0)
    assert_close(grads[0], want_grads[0], slack=80, size=4.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_extremes(dtype: torch.dtype) -> None:
    x = torch.tensor([-3e38, -1e4, -90.0, -20.0, -1e-30, 0.0, 1e-38, 20.0, 90.0, 1e4, 3e38]).to(dtype).requires_grad_()
    out = ops.bias_gelu(x)
    (dx,) = torch.autograd.grad(out.sum(), x)
    want = torch.where(x > 10, x, torch.where(x < -10, 0.0, x / 2)).detach()
    torch.testing.assert_close(out.float(), want.float(), rtol=1e-6, atol=1e-4)
    slope = torch.tensor([0.0, 0, 0, 0, 0.5, 0.5, 0.5, 1, 1, 1, 1])
    torch.testing.assert_close(dx.float(), slope, rtol=1e-6, atol=1e-6)
    gates = torch.cat([x.detach(), torch.ones_like(x)]).requires_grad_()
    out = ops.swiglu(gates)
    (dx,) = torch.autograd.grad(out.sum(), gates)
    torch.testing.assert_close(out.float(), want.float(), rtol=1e-6, atol=1e-4)
    assert torch.isfinite(dx).all()


def test_gradients_by_finite_differences() -> None:
    x, bias = random(3, 10, dtype=torch.float64).requires_grad_(), random(10, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(ops.bias_gelu, (x, bias))
    assert torch.autograd.gradcheck(ops.bias_gelu, (x,))
    assert torch.autograd.gradcheck(ops.swiglu, (x,))


def test_strided_input() -> None:
    base = random(6, 4, 30)
    for x in (base.transpose(0, 1), base[..., ::3], base[:, ::2]):
        assert torch.equal(ops.bias_gelu(x), ops.bias_gelu(x.contiguous()))
        assert torch.equal(ops.swiglu(x), ops.swiglu(x.contiguous()))


def test_reference_agrees_with_torch() -> None:
    x, bias = random(5, 12), random(12)
    torch.testing.assert_close(reference.bias_gelu(x, bias), F.gelu(x + bias, approximate="tanh"))
    torch.testing.assert_close(ops.bias_gelu_erf(x, bias), F.gelu(x + bias))
    torch.testing.assert_close(reference.swiglu(x), F.silu(x[:, :6]) * x[:, 6:])


def test_bad_input_is_named() -> None:
    with pytest.raises(RuntimeError, match="last dimension of `x` must be even"):
        ops.swiglu(torch.randn(3, 5))
    with pytest.raises(RuntimeError, match=r"`bias` must have shape \[6\]"):
        ops.bias_gelu(torch.randn(3, 6), torch.randn(5))
