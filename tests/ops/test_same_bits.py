"""Results do not depend on the number of threads, and one source serves every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mlm_cli import ops
from tests.ops.oracle import kernels  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _run_all(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(1)
    x, residual = (torch.randn(1003, 200).to(dtype).requires_grad_() for _ in range(2))
    weight, bias = torch.randn(200).to(dtype).requires_grad_(), torch.randn(200).to(dtype).requires_grad_()
    scores = torch.randn(4, 3, 130, 131).to(dtype).requires_grad_()
    out: list[Tensor] = []

    def keep(results: Tensor | tuple[Tensor, ...], leaves: list[Tensor]) -> None:
        results = results if isinstance(results, tuple) else (results,)
        out.extend(results)
        out.extend(torch.autograd.grad([r.float().square().sum() for r in results], leaves))

    keep(ops.layer_norm(x, weight, bias), [x, weight, bias])
    keep(ops.rms_norm(x, weight), [x, weight])
    keep(ops.residual_norm(x, residual, weight, bias, bias=bias, dropout=0.2), [x, residual, weight, bias])
    keep(ops.bias_gelu(x, bias), [x, bias])
    keep(ops.swiglu(x), [x])
    keep(ops.scaled_causal_softmax(scores, 0.1, dropout=0.1), [scores])
    keep(ops.scaled_masked_softmax(scores, torch.rand(130, 131) < 0.2, 0.1), [scores])
    if dtype == torch.float32:
        query, key, value = (torch.randn(2, n, 2500, 16).requires_grad_() for n in (4, 2, 2))
        runs = ops.runs_of_keys(2500, 2500, causal=True, pattern=ops.SparsePattern("local", window=700))
        assert runs is not None
        keep(ops.interval_attention(query, key, value, *runs, 0.2), [query, key, value])
    logits, labels = torch.randn(301, 777).to(dtype), torch.randint(0, 777, (301,))
    top, total, target = ops.cross_entropy_stats(logits, labels, 0, 770)
    out.extend([top, total, target])
    out.append(ops.cross_entropy_grad_(logits, labels, top + total.log(), torch.ones(301), 0, 770))
    state = [torch.randn(100_001) for _ in range(3)] + [torch.rand(100_001)]
    settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.1, "step": 2}
    ops.adamw_(state[0], state[1].to(dtype), state[2], state[3], **settings)
    return [t.detach().clone() for t in [*out, *state]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_equal_whatever_the_thread_count(dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    threads(1)
    want = _run_all(dtype)
    for count in (1, 2, 3, 5):
        threads(count)
        for number, (a, b) in enumerate(zip(_run_all(dtype), want, strict=True)):
            assert torch.equal(a, b), f"result {number} with {count} threads"


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Rows are worked on in groups; alone or in a batch they give the same bits."""
    x, weight, bias = torch.randn(37, 300), torch.randn(300), torch.randn(300)
    whole = ops.layer_norm(x, weight, bias)
    assert torch.equal(torch.cat([ops.layer_norm(row[None], weight, bias) for row in x]), whole)
    whole = ops.rms_norm(x.bfloat16(), weight)
    assert torch.equal(torch.cat([ops.rms_norm(row[None].bfloat16(), weight) for row in x]), whole)


@pytest.mark.parametrize("isa", [pytest.param("avx512", marks=pytest.mark.slow), "avx2", "plain"])
def test_every_instruction_set_passes_the_same_tests(isa: str) -> None:
    """Runs the accuracy tests of this folder again on a lower instruction set."""
    if torch.ops.mlm.cpu_level() == ("plain", "avx2", "avx512").index(isa):
        pytest.skip(f"{isa} is what the tests of this folder run on here")
    names = ("norm", "softmax", "activation", "cross_entropy", "optimizer", "interval_attention")
    files = [str(ROOT / "tests" / "ops" / f"test_{name}.py") for name in names]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        "agree or follow or extreme or slices or definition",
    ]
    environment = {**os.environ, "MLM_CPU_ISA": isa, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *files], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
