"""What torch asks of an operator: schema, fake-tensor and autograd rules, and working under ``torch.compile``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mlm_cli import ops
from tests.ops.oracle import kernels  # noqa: F401


def _cases() -> dict[str, tuple[Any, ...]]:
    x, residual, weight, bias = torch.randn(6, 20), torch.randn(6, 20), torch.randn(20), torch.randn(20)
    mean, rstd, seed = torch.randn(6), torch.rand(6), torch.tensor([5])
    scores, mask = torch.randn(2, 5, 7), torch.rand(5, 7) < 0.3
    labels, rows = torch.randint(0, 20, (6,)), torch.rand(6)
    grad = x.clone().requires_grad_()
    query, key = torch.randn(2, 4, 5, 16).requires_grad_(), torch.randn(2, 2, 5, 16).requires_grad_()
    begin, end = torch.zeros(1, 5, dtype=torch.int64), torch.arange(5)[None]
    return {
        "layer_norm": (grad, weight.clone().requires_grad_(), bias.clone().requires_grad_(), 1e-5),
        "rms_norm": (grad, weight.clone().requires_grad_(), 1e-5),
        "norm_backward": (x, residual, weight, bias, mean, rstd),
        "residual_norm": (grad, residual, weight.clone().requires_grad_(), bias, bias, None, 1e-5, 0.0, False),
        "residual_norm.dropout": (grad, residual, weight, None, None, seed, 1e-5, 0.5, True),
        "residual_norm_backward": (x, x, residual, weight, bias, bias, mean, rstd, seed, 0.5, False),
        "masked_softmax": (scores.clone().requires_grad_(), mask, None, 0.5, 0.0),
        "masked_softmax.dropout": (scores.clone().requires_grad_(), None, seed, 0.5, 0.5),
        "causal_softmax": (scores.clone().requires_grad_(), None, 0.5, 2, 3, 0.0),
        "softmax_backward": (scores, scores, None, 0.5, 0.0, True, 2, 3),
        "interval_attention": (query, key, key.detach(), begin, end, 0.5),
        "interval_attention_backward": (query.detach(), query, key, key, torch.rand(2, 4, 5), begin, end, 0.5),
        "bias_gelu": (grad, bias.clone().requires_grad_()),
        "bias_gelu_backward": (x, x, bias),
        "swiglu": (grad,),
        "swiglu_backward": (torch.randn(6, 10), x),
        "cross_entropy_stats": (x, labels, 0, 18),
        "cross_entropy_grad_": (x.clone(), labels, rows, rows, 0, 18),
        "adamw_": (x.clone(), x, x.clone(), rows.new_ones(6, 20), None, 1e-3, 0.9, 0.95, 1e-8, 0.1, 2, 1.0),
    }


@pytest.mark.parametrize("name", list(_cases()))
def test_opcheck(name: str) -> None:
    operator = getattr(torch.ops.mlm, name.split(".")[0]).default
    torch.library.opcheck(operator, _cases()[name])


def _block(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    normed, total = ops.residual_norm(x, residual, weight, bias, bias=bias)
    mixed = ops.scaled_causal_softmax(normed @ normed.transpose(-1, -2), 0.3) @ normed
    inner = ops.swiglu(torch.cat([ops.bias_gelu(mixed, bias), ops.rms_norm(total, weight)], -1))
    hidden = torch.zeros(1, inner.shape[-1], dtype=torch.bool)
    return ops.layer_norm(ops.scaled_masked_softmax(inner, hidden) + total, weight, bias).square().mean()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(backend: str) -> None:
    torch._dynamo.reset()
    inputs = [torch.randn(2, 9, 16), torch.randn(2, 9, 16), torch.randn(16), torch.randn(16)]
    leaves = [t.requires_grad_() for t in inputs]
    want = _block(*leaves)
    want_grads = torch.autograd.grad(want, leaves)
    compiled = torch.compile(_block, fullgraph=True, backend=backend, dynamic=backend == "aot_eager")
    got = compiled(*leaves)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, leaves), want_grads, strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


def test_compiled_loss_and_optimizer() -> None:
    def step(logits: Tensor, labels: Tensor, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> Tensor:
        top, total, target = ops.cross_entropy_stats(logits, labels, 0, 12)
        lse = top + total.log()
        grad = logits.clone()
        ops.cross_entropy_grad_(grad, labels, lse, torch.ones_like(lse), 0, 12)
        ops.adamw_(
            master, grad, exp_avg, exp_avg_sq,
            lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, step=1,
        )  # fmt: skip
        return lse - target

    def state() -> list[Tensor]:
        torch.manual_seed(0)
        return [torch.randn(4, 12), torch.randint(0, 12, (4,)), *(torch.zeros(4, 12) for _ in range(3))]

    torch._dynamo.reset()
    one, two = state(), state()
    want = step(*one)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*two)
    torch.testing.assert_close(got, want)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


def test_dropout_under_compile_draws_from_the_generator() -> None:
    torch._dynamo.reset()

    def run(x: Tensor) -> Tensor:
        return ops.scaled_masked_softmax(x, None, 1.0, 0.5)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = torch.randn(30, 40)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    torch._dynamo.reset()


def test_without_gradients_no_graph_is_made() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    with torch.no_grad():
        assert ops.rms_norm(x, weight).grad_fn is None
    with torch.inference_mode():
        assert ops.rms_norm(x, weight).is_inference()
    assert ops.rms_norm(x.detach(), weight.detach()).grad_fn is None
    assert ops.rms_norm(x.detach(), weight).requires_grad


def test_second_derivatives_are_refused() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(ops.rms_norm(x, torch.ones(8)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()
