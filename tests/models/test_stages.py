"""Stages are consecutive, none is empty, and the dearest is as cheap as can be."""

from __future__ import annotations

from itertools import combinations

import pytest

from mlm_cli.config.resolve import resolve_recipe
from mlm_cli.launch.memory import parameters_per_rank
from mlm_cli.models.gpt import gpt_layer_specs
from mlm_cli.models.registry import build_gpt
from mlm_cli.models.stages import balance, layer_costs
from mlm_cli.parallel.context import Group, ParallelContext


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@pytest.mark.parametrize("costs", [[0, 4, 4, 4, 4, 0, 9], [0, 1, 0, 0, 7], [5, 5, 5, 5, 5]])
def test_the_dearest_stage_is_as_cheap_as_any_cut_makes_it(costs: list[int], stages: int) -> None:
    parts = balance(costs, stages)
    assert [number for part in parts for number in part] == list(range(len(costs))) and all(parts)
    cuts = combinations(range(1, len(costs)), stages - 1)
    best = min(max(sum(costs[a:b]) for a, b in zip((0, *cut), (*cut, len(costs)), strict=True)) for cut in cuts)
    assert max(sum(costs[number] for number in part) for part in parts) == best


def test_stages_hold_the_parameters_of_the_whole_and_the_plan_knows_how_many() -> None:
    model = resolve_recipe("debug/gpt", ["model.vocab_size=300", "model.num_layers=5"], verb="plan").model
    whole = dict(build_gpt(model, ParallelContext.single()).named_parameters())
    sizes, names = [], []
    for rank in range(3):
        stage = build_gpt(model, ParallelContext(pipeline=Group(rank, 3)))
        for name, param in stage.named_parameters():
            assert param.equal(whole[name]), f"{name} depends on the stage"
        sizes.append(sum(param.numel() for param in stage.parameters()))
        names += [name for name, _ in stage.named_parameters()]
    assert set(names) == set(whole) and sorted(names).count("embedding.word.weight") == 2
    assert max(sizes) == parameters_per_rank(model, 1, 3)
    specs = gpt_layer_specs(model, ParallelContext.single(), next(iter(whole.values())).dtype)
    assert [spec.cost for spec in specs] == layer_costs(model)


def test_too_few_layers() -> None:
    with pytest.raises(ValueError, match="2 layers cannot fill 3 stages"):
        balance([1, 1], 3)
