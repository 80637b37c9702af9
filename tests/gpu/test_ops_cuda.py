"""The CUDA operators on a real GPU against float64, over a grid as on the CPU. Skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mlm_cli import ops
from mlm_cli.ops import reference, registry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the CUDA operators are not run here"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOOSE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SHAPES = [(5, 1), (4, 7), (33, 129), (70, 384), (257, 768), (64, 1024), (40, 4096), (9, 8192), (7, 8200)]
SHAPES += [(5, 16384), (300, 16384), (3, 32768), (70, 65536), (2, 65537), (5000, 512), (0, 16), (2, 3, 5, 48)]


@pytest.fixture(autouse=True)
def cuda_kernels() -> None:
    assert registry.cuda_loaded, f"the CUDA operators are not in use: {registry.cuda_reason}"
    torch.manual_seed(7)


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def _compare(
    function: Callable[..., Tensor], oracle: Callable[..., Tensor], inputs: list[Tensor], *, scale: float = 1.0
) -> None:
    leaves = [t.clone().requires_grad_() for t in inputs]
    exact = [t.double().requires_grad_() for t in inputs]
    got, want = function(*leaves), oracle(*exact)
    grad = torch.randn_like(got)
    loose = LOOSE[got.dtype]
    torch.testing.assert_close(got.double(), want.detach(), rtol=loose, atol=loose * scale)
    rows = max(1, got.numel() // got.shape[-1])
    grads = torch.autograd.grad(got, leaves, grad)
    for a, b in zip(grads, torch.autograd.grad(want, exact, grad.double()), strict=True):
        size = scale * 4 * (rows**0.5 if a.dim() == 1 and len(inputs[0].shape) > 1 else 1)
        torch.testing.assert_close(a.double(), b, rtol=loose, atol=loose * size)
    again = torch.autograd.grad(function(*leaves), leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))  # same input, same bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias = _random(*shape, dtype=dtype), _random(shape[-1], dtype=dtype), _random(shape[-1], dtype=dtype)
    scale = 400.0 if shape[-1] == 1 else 4.0
    _compare(ops.layer_norm, reference.layer_norm, [x, weight, bias], scale=scale)
    _compare(ops.rms_norm, reference.rms_norm, [x, weight], scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 7), (257, 768), (40, 4096), (9, 8192), (300, 16384), (3, 32776)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_residual_norm_equals_the_cpu(dropout: float, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The dropout mask is the same function of the seed on both devices."""
    x, residual, grad, grad_total = (torch.randn(*shape).to(dtype) for _ in range(4))
    weight, bias, norm_bias = (torch.randn(shape[-1]).to(dtype) for _ in range(3))
    seed = torch.tensor([1234567]) if dropout else None
    results = []
    for device in ("cpu", "cuda"):
        moved = [t.to(device) for t in (x, residual, weight, norm_bias, bias)]
        key = seed.to(device) if seed is not None else None
        out, total, mean, rstd = torch.ops.mlm.residual_norm(*moved, key, 1e-5, dropout, False)
        back = torch.ops.mlm.residual_norm_backward(
            grad.to(device), grad_total.to(device), total, *moved[2:], mean, rstd, key, dropout, False
        )
        results.append([t.cpu().float() for t in (out, total, *back)])
    size = 8.0 * x.shape[0] ** 0.5
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2 * LOOSE[dtype], atol=2 * LOOSE[dtype] * size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [1, 7, 64, 257, 1024, 2048, 4096, 8200, 32768, 40000, 131072])
def test_softmaxes(keys: int, dtype: torch.dtype) -> None:
    scores = _random(2, 3, 5, keys, dtype=dtype) * 2
    hidden = torch.rand(2, 1, 5, keys, device="cuda") < 0.4
    hidden[0, 0, 2] = True
    added = torch.randn(5, keys, device="cuda")
    for mask in (None, hidden, added, hidden[:, :, :, :1]):
        _compare(
            lambda x, mask=mask: ops.scaled_masked_softmax(x, mask, 0.7),
            lambda x, mask=mask: reference.scaled_masked_softmax(x, mask, 0.7, 0.0),
            [scores],
        )
    for offset, window in ((0, None), (keys // 2, None), (keys // 2, max(1, keys // 3))):
        _compare(
            lambda x, o=offset, w=window: ops.scaled_causal_softmax(x, 0.7, offset=o, window=w),
            lambda x, o=offset, w=window: reference.scaled_causal_softmax(x, 0.7, o, w, 0.0),
            [scores],
        )
    torch.manual_seed(1)
    dropped = ops.scaled_masked_softmax(scores, None, 0.7, 0.5)
    torch.manual_seed(1)
    assert torch.equal(dropped, ops.scaled_masked_softmax(scores, None, 0.7, 0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 2), (70, 64), (300, 1538), (2, 9, 4096), (0, 8)], ids=str)
def test_activations(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, bias = _random(*shape, dtype=dtype), _random(shape[-1], dtype=dtype)
    _compare(ops.bias_gelu, reference.bias_gelu, [x, bias])
    _compare(ops.bias_gelu, reference.bias_gelu, [x])
    _compare(ops.swiglu, reference.swiglu, [x])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width,valid", [(7, 5), (1000, 997), (50304, 50257), (131072, 131072)])
def test_cross_entropy(width: int, valid: int, dtype: torch.dtype) -> None:
    logits, labels = _random(33, width, dtype=dtype) * 4, torch.randint(0, valid, (33,), device="cuda")
    top, total, target = ops.cross_entropy_stats(logits, labels, 0, valid)
    want = torch.nn.functional.cross_entropy(logits[:, :valid].double(), labels, reduction="none")
    torch.testing.assert_close((top + total.log() - target).double(), want, rtol=1e-5, atol=1e-5)
    exact = torch.softmax(logits[:, :valid].double(), -1) - torch.nn.functional.one_hot(labels, valid)
    ops.cross_entropy_grad_(logits, labels, top + total.log(), torch.ones(33, device="cuda"), 0, valid)
    torch.testing.assert_close(logits[:, :valid].double(), exact, rtol=LOOSE[dtype], atol=LOOSE[dtype])
    assert (logits[:, valid:] == 0).all()


@pytest.mark.parametrize("count", [1, 1003, 1 << 20])
def test_adamw_equals_the_cpu(count: int) -> None:
    state = [torch.randn(count), torch.randn(count), torch.rand(count)]
    grad, copies = torch.randn(count).bfloat16(), []
    for device in ("cpu", "cuda"):
        moved = [t.to(device).clone() for t in state]
        copy = torch.zeros(count, dtype=torch.bfloat16, device=device)
        ops.adamw_(
            moved[0], grad.to(device), moved[1], moved[2], copy,
            lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=3, grad_scale=0.5,
        )  # fmt: skip
        copies.append([t.cpu() for t in (*moved, copy.float())])
    for a, b in zip(*copies, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if a is copies[0][3] else 1e-5, atol=1e-6)


def test_the_current_stream_and_device_are_used() -> None:
    stream = torch.cuda.Stream()
    x, weight = _random(4096, 1024, dtype=torch.float32), torch.ones(1024, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = ops.rms_norm(x, weight)
    stream.synchronize()
    torch.testing.assert_close(out, reference.rms_norm(x, weight))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.rms_norm(x, weight)
    x.normal_()
    graph.replay()
    torch.testing.assert_close(captured, reference.rms_norm(x, weight))


def test_float64_goes_to_the_reference() -> None:
    x = torch.randn(3, 8, device="cuda", dtype=torch.float64)
    torch.testing.assert_close(ops.rms_norm(x, torch.ones_like(x[0])), reference.rms_norm(x, torch.ones_like(x[0])))
