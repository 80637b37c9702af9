"""Choosing a token, against the logits processors of `transformers` and against the distribution itself."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers.generation import logits_process as hf

from mlm_cli.errors import UsageError
from mlm_cli.generation import sampling
from mlm_cli.generation.sampling import Sampling

FIRST_NUMBER = 0.1651216038492921


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(4, 1003, generator=torch.Generator().manual_seed(0)) * 4


@pytest.mark.parametrize("k", [1, 2, 50, 1002, 1003, 5000])
def test_top_k_is_that_of_transformers(logits: torch.Tensor, k: int) -> None:
    expected = hf.TopKLogitsWarper(k)(None, logits.clone())
    assert torch.equal(sampling.cut_top_k(logits, k), expected)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("scale", [1.0, 0.01], ids=["peaked", "flat"])
def test_top_p_is_that_of_transformers(logits: torch.Tensor, p: float, scale: float) -> None:
    expected = hf.TopPLogitsWarper(p)(None, logits * scale)
    assert torch.equal(sampling.cut_top_p(logits * scale, p), expected)


def test_top_p_after_top_k_is_that_of_transformers(logits: torch.Tensor) -> None:
    for k, p in itertools.product((3, 40), (0.3, 0.8)):
        expected = hf.TopPLogitsWarper(p)(None, hf.TopKLogitsWarper(k)(None, logits.clone()))
        assert torch.equal(sampling.cut_top_p(sampling.cut_top_k(logits, k), p), expected)


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_is_that_of_transformers(logits: torch.Tensor, penalty: float) -> None:
    seen = torch.tensor([5, 900, 5, 17, 0])
    expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(seen[None], logits[:1].clone())
    assert torch.equal(sampling.penalise_repetition(logits[0].clone(), seen, penalty), expected[0])


def test_greedy_takes_the_likeliest_and_leaves_the_logits_alone(logits: torch.Tensor) -> None:
    before = logits.clone()
    assert sampling.choose(logits, Sampling(temperature=0)) == logits.argmax(-1).tolist()
    seen = [row.argmax()[None] for row in logits]
    penalised = sampling.choose(logits, Sampling(temperature=0, repetition_penalty=100.0), seen=seen)
    assert all(token != int(row.argmax()) for token, row in zip(penalised, logits, strict=True))
    assert torch.equal(logits, before)


def test_draws_follow_the_distribution() -> None:
    """20,000 draws from the softmax after temperature and top-k: chi-squared with 7 degrees below its 99.99 % point."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -30.0, 1.5, 0.2, -2.0])
    options = Sampling(temperature=0.8, top_k=8, seed=7)
    count = 20_000
    numbers = [sampling.uniform(7, 3, token) for token in range(count)]
    drawn = torch.tensor(sampling.choose(logits.expand(count, -1), options, numbers=numbers))
    expected = torch.softmax(hf.TopKLogitsWarper(8)(None, logits[None] / 0.8)[0], -1) * count
    observed = torch.bincount(drawn, minlength=10).float()
    assert observed[expected == 0].sum() == 0
    kept = expected > 0
    assert ((observed - expected)[kept] ** 2 / expected[kept]).sum() < 29.9


def test_extreme_random_numbers_pick_a_possible_token() -> None:
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.5, -torch.inf]])
    assert sampling.draw(logits, [0.0]).tolist() == [1]
    assert sampling.draw(logits, [1 - 2.0**-53]).tolist() == [3]


def test_random_numbers_are_a_function_of_seed_prompt_and_token() -> None:
    numbers = [sampling.uniform(s, p, t) for s in range(4) for p in range(4) for t in range(64)]
    assert len(set(numbers)) == len(numbers) and all(0 <= n < 1 for n in numbers)
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.03
    # Frozen: the same command must give the same text in the next version too.
    assert sampling.uniform(1234, 0, 0) == pytest.approx(FIRST_NUMBER, abs=0)


def test_a_row_does_not_depend_on_its_neighbours(logits: torch.Tensor) -> None:
    options = Sampling(temperature=0.9, top_k=40, top_p=0.9, repetition_penalty=1.2)
    seen = [torch.arange(row, 20 + row) for row in range(4)]
    numbers = [sampling.uniform(1, row, 0) for row in range(4)]
    together = sampling.choose(logits, options, seen=seen, numbers=numbers)
    alone = [sampling.choose(logits[r : r + 1], options, seen=[seen[r]], numbers=[numbers[r]])[0] for r in range(4)]
    assert together == alone


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_marked(logits: torch.Tensor, temperature: float) -> None:
    options, numbers = Sampling(temperature=temperature), [0.5] * len(logits)
    before = sampling.choose(logits, options, numbers=numbers)
    logits[2, 7] = torch.nan
    logits[0, 3] = torch.inf
    found = sampling.choose(logits, options, numbers=numbers)
    assert found == [-1, before[1], -1, *before[3:]]


def test_the_smallest_temperature_is_greedy_and_the_largest_penalty_finite(logits: torch.Tensor) -> None:
    numbers = [0.999] * len(logits)
    greedy = sampling.choose(logits, Sampling(temperature=0))
    assert sampling.choose(1e4 * logits, Sampling(temperature=1e-6), numbers=numbers) == greedy
    seen = [torch.arange(3)] * len(logits)
    for penalty in (1e-3, 1e3):
        assert min(sampling.choose(1e4 * logits, Sampling(1e-6, repetition_penalty=penalty), seen, numbers)) >= 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1},
        {"repetition_penalty": 0.0}, {"repetition_penalty": float("inf")},
    ],
)  # fmt: skip
def test_values_out_of_range_are_usage_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=str(next(iter(wrong.values())))):
        Sampling(**wrong)
