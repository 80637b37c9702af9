"""The CUDA kernels without a GPU: their source is compiled for the CPU against an emulation of threads, shuffles and
barriers (emulation/cuda_on_cpu.h), and must agree with the CPU operators, dropout masks included.

What this does not show: speed, and whether a real GPU agrees. For that see tests/gpu/ and `make gpu-check`.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mlm_cli import ops
from tests.ops.oracle import kernels  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LOOSE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
NO_WINDOW = 2**62


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    folder = Path(__file__).parent / "emulation"
    library = tmp_path_factory.mktemp("emulation") / "kernels.so"
    # The fibers jump between stacks, which glibc's fortified longjmp takes for an error.
    flags = ["-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", f"-I{folder}"]
    subprocess.run([compiler, *flags, str(folder / "kernels_on_cpu.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def _call(function: Any, *arguments: Any) -> None:
    converted = []
    for value in arguments:
        if value is None or isinstance(value, Tensor):
            converted.append(ctypes.c_void_p(None if value is None else value.data_ptr()))
        elif isinstance(value, bool):
            converted.append(ctypes.c_int(int(value)))
        elif isinstance(value, int):
            converted.append(ctypes.c_int64(value))
        elif isinstance(value, float):
            converted.append(ctypes.c_double(value))
        else:
            converted.append(value)
    function(*converted)


def _aligned(x: Tensor) -> bool:
    return x.shape[-1] * x.element_size() % 16 == 0


def _close(got: Tensor, want: Tensor, scale: float = 1.0) -> None:
    loose = LOOSE[want.dtype]
    torch.testing.assert_close(got, want.to(got.dtype), rtol=loose, atol=loose * scale)


WIDTHS = [1, 5, 64, 129, 256, 1000, 2048, 4096, 8192, 8200, 16384, 16392, 36864]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["layer", "rms", "residual"])
def test_norms(emulated: ctypes.CDLL, kind: str, width: int, dtype: torch.dtype) -> None:
    rows = 6 if width < 3000 else 3
    if width == 36864 and dtype != torch.float32:
        width = 69632  # past what registers hold, forward; the backward pass has its own kernels from 16,392 on
    x, grad, residual, grad_total = (torch.randn(rows, width).to(dtype) for _ in range(4))
    weight, bias, pre = torch.randn(width), torch.randn(width), torch.randn(width)
    seed, p = torch.tensor([123456789012]), 0.3 if kind == "residual" else 0.0
    rms = kind == "rms"
    out, total, dx, dbranch = (torch.full_like(x, 7.0) for _ in range(4))
    mean, rstd = torch.full((rows,), 7.0), torch.full((rows,), 7.0)
    is_residual = kind == "residual"
    _call(
        emulated.norm_forward, ctypes.c_int(DTYPES[dtype]), _aligned(x), x, residual if is_residual else None,
        pre if is_residual else None, weight, None if rms else bias, total if is_residual else None, out,
        None if rms else mean, rstd, rows, width, seed, p,
    )  # fmt: skip
    mlm = torch.ops.mlm
    if is_residual:
        want, want_total, want_mean, want_rstd = mlm.residual_norm(x, residual, weight, bias, pre, seed, 1e-5, p, False)
        _close(total, want_total, 4)
        total = want_total
    elif rms:
        want, want_rstd = mlm.rms_norm(x, weight, 1e-5)
        want_mean = None
    else:
        want, want_mean, want_rstd = mlm.layer_norm(x, weight, bias, 1e-5)
    _close(out, want, 4)
    torch.testing.assert_close(rstd, want_rstd, rtol=1e-4, atol=1e-5)
    if width > 20000:  # nothing new backward, and a block of fibers takes long
        return

    lines = 2  # of one row or more each
    partials = [torch.full((lines, width), 7.0) for _ in range(3)]
    terms = torch.full((rows, 2), 7.0)
    source = total if is_residual else x
    _call(
        emulated.norm_backward, ctypes.c_int(DTYPES[dtype]), _aligned(x), grad, grad_total if is_residual else None,
        source, weight, want_mean, want_rstd, dx, dbranch if is_residual else None, partials[0],
        None if rms else partials[1], partials[2] if is_residual else None, terms, rows, width, lines, seed, p,
    )  # fmt: skip
    sums = [torch.full((width,), 7.0) for _ in range(3)]
    for partial, column in zip(partials, sums, strict=True):
        _call(emulated.column_sums, partial, column, lines, width)
    if is_residual:
        wanted = mlm.residual_norm_backward(
            grad, grad_total, total, weight, bias, pre, want_mean, want_rstd, seed, p, False
        )
        _close(dbranch, wanted[1], 4)
        assert torch.equal(dbranch == 0, wanted[1] == 0)  # the same mask
        torch.testing.assert_close(sums[2], wanted[4], rtol=1e-3, atol=1e-3)
        dweight, dbias = wanted[2], wanted[3]
    else:
        wanted = mlm.norm_backward(grad, x, weight, None if rms else bias, want_mean, want_rstd)
        dweight, dbias = wanted[1], wanted[2]
    scale = 400.0 if width == 1 else 4.0
    _close(dx, wanted[0], scale)
    torch.testing.assert_close(sums[0], dweight, rtol=1e-3, atol=1e-3)
    if not rms:
        torch.testing.assert_close(sums[1], dbias, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [1, 7, 64, 257, 1024, 4096, 8200, 36864])
@pytest.mark.parametrize("kind", ["plain", "bool", "float", "lowest", "same", "causal", "window", "dropout"])
def test_softmaxes(emulated: ctypes.CDLL, kind: str, keys: int, dtype: torch.dtype) -> None:
    batch, queries = (2, 3) if keys < 5000 else (1, 2)
    rows = batch * queries
    scores, grad = (torch.randn(batch, queries, keys) * 2).to(dtype), torch.randn(batch, queries, keys).to(dtype)
    masks = {
        "bool": torch.rand(queries, keys) < 0.5,
        "float": torch.randn(batch, 1, keys),
        "lowest": torch.randn(queries, keys),
        "same": torch.randn(batch, queries, 1).to(dtype),
    }
    mask = masks.get(kind)
    if kind == "bool":
        mask[0] = True  # a row with every key hidden
    if kind == "lowest":  # how others hide: a row of it is no row of nothing
        mask[0] = torch.finfo(torch.float32).min
    kinds = {"bool": 1, "float": 2, "lowest": 2, "same": 2 if dtype == torch.float32 else 3}
    view = mask.expand(batch, queries, keys) if mask is not None else scores
    sizes, strides = torch.tensor([batch, queries]), torch.tensor(view.stride()[:2])
    causal = kind in ("causal", "window")
    offset, window = (keys // 2, max(1, keys // 3)) if kind == "window" else (keys // 2, 0)
    seed, p = torch.tensor([987654321]), 0.4 if kind == "dropout" else 0.0
    out, probs, dx = (torch.full_like(scores, 7.0) for _ in range(3))
    layout = (causal, queries, offset, window or NO_WINDOW)
    _call(
        emulated.softmax_forward, ctypes.c_int(DTYPES[dtype]), _aligned(scores), scores, out, probs if p else None,
        mask, ctypes.c_int(kinds.get(kind, 0)), sizes, strides, ctypes.c_int(2),
        view.stride(2) if mask is not None else 0, rows, keys, ctypes.c_float(0.7), *layout, seed, p,
    )  # fmt: skip
    mlm = torch.ops.mlm
    if causal:
        want, want_probs = mlm.causal_softmax(scores, None, 0.7, offset, window, 0.0)
    else:
        want, want_probs = mlm.masked_softmax(scores, mask, seed if p else None, 0.7, p)
    _close(out, want, 0.1)
    assert torch.equal(out == 0, want == 0) or (want[(out == 0) != (want == 0)].abs() < 1e-6).all()
    source = want_probs if p else want
    if p:
        _close(probs, want_probs, 0.1)
    _call(
        emulated.softmax_backward, ctypes.c_int(DTYPES[dtype]), _aligned(scores), grad, source, dx, rows, keys,
        ctypes.c_float(0.7), *layout, seed, p,
    )  # fmt: skip
    _close(dx, mlm.softmax_backward(grad, source, seed if p else None, 0.7, p, causal, offset, window))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 8, 40, 333, 1024])
def test_activations(emulated: ctypes.CDLL, width: int, dtype: torch.dtype) -> None:
    rows, per_block = 70, 32
    code, mlm = ctypes.c_int(DTYPES[dtype]), torch.ops.mlm
    x, grad, bias = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype), torch.randn(width)
    out, dx = torch.full_like(x, 7.0), torch.full_like(x, 7.0)
    partial, dbias = torch.full((-(-rows // per_block), width), 7.0), torch.full((width,), 7.0)
    _call(emulated.activation_forward, ctypes.c_int(0), code, _aligned(x), x, bias, out, rows, width)
    _close(out, mlm.bias_gelu(x, bias))
    _call(
        emulated.activation_backward,
        ctypes.c_int(0),
        code,
        _aligned(x),
        grad,
        x,
        bias,
        dx,
        partial,
        rows,
        width,
        per_block,
    )
    _call(emulated.column_sums, partial, dbias, len(partial), width)
    wanted = mlm.bias_gelu_backward(grad, x, bias)
    _close(dx, wanted[0])
    torch.testing.assert_close(dbias, wanted[1], rtol=1e-3, atol=1e-3)

    both = torch.randn(rows, 2 * width).to(dtype)
    dboth = torch.full_like(both, 7.0)
    _call(emulated.activation_forward, ctypes.c_int(1), code, _aligned(x), both, None, out, rows, width)
    _close(out, mlm.swiglu(both))
    _call(
        emulated.activation_backward, ctypes.c_int(1), code, _aligned(x), grad, both, None, dboth, None, rows, width, 32
    )
    _close(dboth, mlm.swiglu_backward(grad, both))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width,valid", [(1, 1), (7, 5), (1000, 997), (4096, 2049), (3001, 3001)])
def test_cross_entropy(emulated: ctypes.CDLL, width: int, valid: int, dtype: torch.dtype) -> None:
    rows, start = 4, 3
    logits = (torch.randn(rows, width) * 4).to(dtype)
    logits[:, valid:] = 1e4
    labels = torch.tensor([start, start + valid - 1, start - 1, start + valid])
    stats = [torch.full((rows,), 7.0) for _ in range(3)]
    sizes = (rows, width, width, valid, start)
    code = ctypes.c_int(DTYPES[dtype])
    _call(emulated.cross_entropy, code, _aligned(logits), logits, labels, *stats, None, None, *sizes)
    wanted = torch.ops.mlm.cross_entropy_stats(logits, labels, start, valid)
    for got, want in zip(stats, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    lse, scale, want_grad = stats[0] + stats[1].log(), torch.rand(rows), logits.clone()
    torch.ops.mlm.cross_entropy_grad_(want_grad, labels, lse, scale, start, valid)
    _call(emulated.cross_entropy, code, _aligned(logits), logits, labels, None, None, None, lse, scale, *sizes)
    _close(logits, want_grad, 0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("copy_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("count", [1, 1003, 4096])
def test_adamw(emulated: ctypes.CDLL, count: int, copy_dtype: torch.dtype | None, dtype: torch.dtype) -> None:
    grad = torch.randn(count).to(dtype)
    state = [torch.randn(count), torch.randn(count), torch.rand(count)]
    want_state = [t.clone() for t in state]
    copy = None if copy_dtype is None else torch.zeros(count, dtype=copy_dtype)
    lr, beta1, beta2, eps, decay, step = 1e-2, 0.9, 0.95, 1e-8, 0.1, 3
    bias1, bias2 = 1 - beta1**step, 1 - beta2**step
    settings = torch.tensor([1 - lr * decay, beta2, 1 - beta1, 1 - beta2, lr / bias1, bias2**-0.5, eps, 0.5])
    _call(
        emulated.adamw, ctypes.c_int(DTYPES[dtype]), count % 4 == 0, state[0], grad, state[1], state[2], copy,
        ctypes.c_int(DTYPES.get(copy_dtype, 0)), count, settings,
    )  # fmt: skip
    ops.adamw_(
        want_state[0], grad, want_state[1], want_state[2],
        lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=decay, step=step, grad_scale=0.5,
    )  # fmt: skip
    for got, want in zip(state, want_state, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    if copy is not None:
        assert torch.equal(copy, state[0].to(copy_dtype))
