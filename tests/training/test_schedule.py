"""Learning rates against closed forms and against transformers' schedulers."""

from __future__ import annotations

import math

import pytest
import torch

from mlm_cli.training.schedule import Schedule


def from_transformers(make: str, steps: int, **options: object) -> list[float]:
    """Rates of updates 1..steps; transformers counts its lambda from 0, so ours is its next value."""
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = getattr(transformers.optimization, make)(optimizer, **options)
    rates = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_cosine_and_linear_are_those_of_transformers(warmup: int) -> None:
    options = {"num_warmup_steps": warmup, "num_training_steps": 40}
    for decay, make in (("cosine", "get_cosine_schedule_with_warmup"), ("linear", "get_linear_schedule_with_warmup")):
        ours = Schedule(lr=2.0, steps=40, warmup_steps=warmup, decay=decay)  # type: ignore[arg-type]
        assert [ours(step) for step in range(1, 41)] == pytest.approx(from_transformers(make, 40, **options), abs=1e-9)


def test_cosine_to_a_floor_is_that_of_transformers() -> None:
    theirs = from_transformers(
        "get_cosine_with_min_lr_schedule_with_warmup", 30, num_warmup_steps=5, num_training_steps=30, min_lr=0.5
    )
    ours = Schedule(lr=2.0, steps=30, warmup_steps=5, min_lr=0.5)
    assert [ours(step) for step in range(1, 31)] == pytest.approx(theirs, abs=1e-9)


def test_wsd_is_that_of_transformers() -> None:
    theirs = from_transformers(
        "get_wsd_schedule",
        50,
        num_warmup_steps=6,
        num_stable_steps=34,
        num_decay_steps=10,
        warmup_type="linear",
        decay_type="linear",
    )
    ours = Schedule(lr=2.0, steps=50, warmup_steps=6, decay="wsd", decay_steps=10)
    assert [ours(step) for step in range(1, 51)] == pytest.approx(theirs, abs=1e-9)


def test_closed_form_of_wsd_with_a_floor() -> None:
    ours = Schedule(lr=2.0, steps=50, warmup_steps=6, decay="wsd", decay_steps=10, min_lr=0.2)
    assert [ours(step) for step in (3, 6, 40)] == [1.0, 2.0, 2.0]
    assert [ours(step) for step in (45, 50, 60)] == pytest.approx([1.1, 0.2, 0.2])
    assert Schedule(lr=2.0, steps=50, decay="wsd")(48) == pytest.approx(0.8)  # a tenth of the run


def test_closed_form_of_the_cosine() -> None:
    ours = Schedule(lr=1e-3, steps=1000, warmup_steps=100, decay_steps=900, min_lr=1e-4)
    assert ours(50) == pytest.approx(5e-4)
    assert ours(100) == 1e-3
    assert ours(500) == pytest.approx(1e-4 + 0.5 * 9e-4 * (1 + math.cos(math.pi * 400 / 800)))
    assert ours(900) == ours(1000) == ours(2000) == pytest.approx(1e-4)


def test_constant_and_the_first_update() -> None:
    assert [Schedule(lr=3.0, steps=9, decay="constant")(step) for step in (1, 5, 99)] == [3.0] * 3
    assert Schedule(lr=3.0, steps=9, warmup_steps=3)(1) == 1.0  # not wasted on a rate of 0
    assert Schedule(lr=3.0, steps=5, warmup_steps=50)(5) == pytest.approx(0.3)  # a run shorter than its warm-up
    assert Schedule(lr=3.0, steps=5, warmup_steps=5)(5) == 3.0
