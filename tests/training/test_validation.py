"""The validation loss is one number, whatever the layout and micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mlm_cli.parallel.context import ParallelContext
from mlm_cli.training.validation import Validator


class Numbers:
    """Sample k is the number k, nine times over."""

    def get(self, number: int) -> dict[str, Any]:
        return {"tokens": np.full(9, number, dtype=np.int64), "segments": None}

    def collate(self, samples: list[dict[str, Any]], numbers: list[int]) -> dict[str, np.ndarray]:
        return {"tokens": np.stack([sample["tokens"] for sample in samples])[:, :-1]}


class MeanOfTokens(nn.Module):
    """A "model" whose loss is the mean token; it must be asked in evaluation mode."""

    def loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        assert not self.training and not torch.is_grad_enabled()
        tokens = batch["tokens"].double()
        return tokens.mean(), torch.tensor(float(tokens.numel()))


def _validate(rank: int, size: int) -> list[float]:
    model = MeanOfTokens().train()
    found = [
        Validator(Numbers(), ParallelContext.create(), num_samples=7, micro_batch_size=micro)(model)["valid_loss"]
        for micro in (1, 2, 3, 7, 10)
    ]
    assert model.training
    return found


def test_same_for_any_micro_batch_and_data_size(run_ranks: Callable[..., list[Any]]) -> None:
    expected = [np.mean(range(7))] * 5
    assert _validate(0, 1) == pytest.approx(expected)
    for found in run_ranks(_validate, 2):
        assert found == pytest.approx(expected)
