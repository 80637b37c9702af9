"""Float64 oracles, tolerances and the one fixture of the operator tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from mlm_cli.ops import registry

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}

# One rounding of the result to its dtype; accumulation adds a few float32 (float64) roundings.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
ACCUMULATED = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-24, torch.float16: 2.0**-24, torch.float64: 2.0**-53}
# Smallest step near zero: below it a result may be lost.
TINY = {torch.float32: 1e-37, torch.bfloat16: 1e-37, torch.float16: 2.0**-25, torch.float64: 1e-300}


@pytest.fixture(autouse=True)
def kernels() -> None:
    """The tests that import this run on the compiled kernels, from a fixed seed. No build is a failure wherever a
    compiler could have made one."""
    torch.manual_seed(20240607)
    if registry.cpu_loaded:
        return
    if shutil.which("g++") or shutil.which("clang++") or shutil.which("c++"):
        pytest.fail(f"compiled kernels are not in use although there is a compiler: {registry.cpu_reason}")
    pytest.skip(f"no C++ compiler on this machine: {registry.cpu_reason}")


def assert_close(got: Tensor, want: Tensor, *, slack: float = 40.0, size: float | Tensor | None = None) -> None:
    """``got`` is ``want`` (float64) rounded to its dtype, give or take ``slack`` roundings of the accumulation.

    ``size`` is the magnitude of what was summed, which is what the accumulation error is relative to; by default the
    largest magnitude of the result.
    """
    assert got.shape == want.shape
    if got.numel() == 0:
        return
    magnitude = want.abs().amax() if size is None else torch.as_tensor(size, dtype=torch.float64)
    bound = want.abs() * ROUNDING[got.dtype] * 1.1 + magnitude * slack * ACCUMULATED[got.dtype] + TINY[got.dtype]
    error = (got.double() - want).abs()
    both_special = ~torch.isfinite(want) & ((got.double() == want) | (got.isnan() & want.isnan()))
    bad = ~((error <= bound) | both_special)
    if bad.any():
        at = int(torch.where(bad, error / bound, 0.0).nan_to_num(torch.inf).argmax())
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} differ; worst at {at}: got {got.flatten()[at].item()!r}, "
            f"want {want.flatten()[at].item()!r}, bound {bound.flatten()[at].item():.3g}"
        )


def with_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Results and the gradients of all inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = function(*leaves)
    results = list(results) if isinstance(results, tuple) else [results]
    return results, list(torch.autograd.grad(results, leaves, list(grads[: len(results)])))


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)
