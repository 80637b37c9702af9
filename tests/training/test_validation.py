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
    """A "model" that scores the mean token and the share of odd ones; it must be asked in evaluation mode."""

    score_names = ("loss", "odd")

    def scores(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled()
        tokens = batch["tokens"].double()
        count = float(tokens.numel())
        return torch.tensor([[tokens.sum(), count], [(tokens % 2).sum(), count]], dtype=torch.float64)


def _validate(rank: int, size: int) -> list[dict[str, float]]:
    model = MeanOfTokens().train()
    found = [
        Validator(Numbers(), ParallelContext.create(), num_samples=7, micro_batch_size=micro)(model)
        for micro in (1, 2, 3, 7, 10)
    ]
    assert model.training
    return found


def test_same_for_any_micro_batch_and_data_size(run_ranks: Callable[..., list[Any]]) -> None:
    expected = pytest.approx({"valid_loss": np.mean(range(7)), "valid_odd": 3 / 7})
    for rank in (_validate(0, 1), *run_ranks(_validate, 2)):
        assert len(rank) == 5 and all(found == expected for found in rank)
