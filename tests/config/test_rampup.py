"""Growing batches: Megatron-LM's rule, as a function of consumed samples alone."""

from __future__ import annotations

import pytest

from mlm_cli.config.checks import check
from mlm_cli.config.derived import global_batch_at, samples_of
from mlm_cli.config.resolve import resolve_recipe
from mlm_cli.config.schema import RampupSection
from mlm_cli.launch.plan import as_text, make_plan

RAMPUP = RampupSection(start=16, increment=8, samples=1000)


def megatron(consumed: int, whole: int, start: int, increment: int, samples: int) -> int:
    """``RampupBatchsizeNumMicroBatchesCalculator.update``, as written there."""
    if consumed > samples:
        return whole
    per_increment = samples / ((whole - start) // increment)
    return min(whole, start + int(consumed / per_increment) * increment)


def test_is_megatrons_rule_at_every_step() -> None:
    consumed, sizes = 0, []
    for step in range(1, 60):
        size = global_batch_at(consumed, 64, RAMPUP)
        assert size == megatron(consumed, 64, 16, 8, 1000)
        sizes.append(size)
        consumed += size
        assert samples_of(step, 64, RAMPUP) == consumed
    assert sorted(set(sizes)) == [16, 24, 32, 40, 48, 56, 64] and sizes == sorted(sizes)
    assert global_batch_at(5, 64, None) == 64 and samples_of(3, 64, None) == 192


def test_the_plan_counts_the_samples_of_small_batches() -> None:
    overrides = ["train.rampup={start: 4, increment: 4, samples: 80}", "train.global_batch_size=16", "train.steps=50"]
    recipe = resolve_recipe("debug/gpt", overrides, verb="plan")
    plan = make_plan(recipe, 1)
    section = recipe.train.rampup
    assert section is not None
    assert plan.tokens == samples_of(50, 16, section) * recipe.model.seq_length < 50 * plan.tokens_per_step
    assert "from 4 by 4 over the first 80 samples" in as_text(plan)


@pytest.mark.parametrize(
    ("rampup", "message"),
    [
        ("{start: 6, increment: 4, samples: 80}", "`train.rampup.start` 6 is not a multiple of the 4 samples"),
        ("{start: 4, increment: 3, samples: 80}", "`train.rampup.increment` 3 is not a multiple"),
        ("{start: 4, increment: 8, samples: 80}", "does not go from 4 to `train.global_batch_size` 16"),
    ],
)
def test_impossible_ones_are_refused_with_a_way_out(rampup: str, message: str) -> None:
    overrides = [f"train.rampup={rampup}", "train.global_batch_size=16", "train.micro_batch_size=4"]
    found = check(resolve_recipe("debug/gpt", overrides, verb="plan"), verb="plan", world_size=1)
    assert [mistake for mistake in found if message in mistake.message]
    key, _, value = found[0].hint.removeprefix("use `").removesuffix("`").partition("=")
    fixed = resolve_recipe("debug/gpt", [*overrides, f"{key}={value}"], verb="plan")
    assert not [m for m in check(fixed, verb="plan", world_size=1) if message in m.message]
