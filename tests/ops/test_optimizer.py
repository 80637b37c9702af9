from __future__ import annotations

import pytest
import torch

from mlm_cli import ops
from tests.ops.oracle import NAMES, kernels  # noqa: F401


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=NAMES.get)
@pytest.mark.parametrize("copy_dtype", [None, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1, 37, 5000, 100_003])
def test_adamw_follows_torchs(size: int, copy_dtype: torch.dtype | None, grad_dtype: torch.dtype) -> None:
    start = torch.randn(size)
    exact = torch.nn.Parameter(start.double())
    settings = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW([exact], foreach=False, **settings)
    master, exp_avg, exp_avg_sq = start.clone(), torch.zeros(size), torch.zeros(size)
    copy = None if copy_dtype is None else torch.zeros(size, dtype=copy_dtype)
    for step in range(1, 6):
        grad = (torch.randn(size) * 10.0 ** (step - 3)).to(grad_dtype)
        exact.grad = grad.double() * 0.25
        optimizer.step()
        ops.adamw_(
            master, grad, exp_avg, exp_avg_sq, copy,
            lr=3e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=step, grad_scale=0.25,
        )  # fmt: skip
    torch.testing.assert_close(master.double(), exact.detach(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(exp_avg.double(), optimizer.state[exact]["exp_avg"], rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(exp_avg_sq.double(), optimizer.state[exact]["exp_avg_sq"], rtol=2e-6, atol=1e-5)
    if copy is not None:
        assert torch.equal(copy, master.to(copy_dtype))


def test_bad_input_is_named() -> None:
    four = [torch.zeros(4) for _ in range(4)]
    rest = {"lr": 1.0, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.0}
    with pytest.raises(RuntimeError, match="`step` counts from 1, got 0"):
        ops.adamw_(*four, step=0, **rest)
    with pytest.raises(RuntimeError, match="`grad` must have the 4 elements of `master`, got 5"):
        ops.adamw_(four[0], torch.zeros(5), *four[2:], step=1, **rest)
    with pytest.raises(RuntimeError, match="`exp_avg` must be float32, got bfloat16"):
        ops.adamw_(four[0], four[1], four[2].bfloat16(), four[3], step=1, **rest)
    with pytest.raises(RuntimeError, match="`master` is updated in place and must be contiguous"):
        ops.adamw_(torch.zeros(8)[::2], *four[1:], step=1, **rest)
