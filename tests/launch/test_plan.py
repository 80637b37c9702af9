"""The plan against published numbers."""

from __future__ import annotations

import json
import re

import pytest

from mlm_cli.config.builtin import builtin_names
from mlm_cli.config.derived import model_parallel_size
from mlm_cli.config.resolve import resolve_recipe
from mlm_cli.errors import UsageError
from mlm_cli.launch import memory
from mlm_cli.launch.plan import as_text, make_plan, with_vocabulary
from mlm_cli.models.count import count_parameters, layer_counts


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "heads", "billions"),
    [
        ("gpt/1.2b", 40, 1536, 16, 1.213),
        ("gpt/2.5b", 54, 1920, 20, 2.490),
        ("gpt/4.2b", 64, 2304, 24, 4.199),
        ("gpt/8.3b", 72, 3072, 32, 8.317),
    ],
)
def test_the_scaling_study_of_megatron_lm(name: str, layers: int, hidden: int, heads: int, billions: float) -> None:
    """Shoeybi et al. 2019, table 1; vocabulary padded to 51,200, sequence 1,024."""
    recipe = resolve_recipe(name, verb="plan")
    model = recipe.model
    assert (model.num_layers, model.hidden_size, model.num_attention_heads) == (layers, hidden, heads)
    plan = make_plan(recipe, recipe.parallel.tensor)
    assert plan.padded_vocab_size == 51200 and plan.seq_length == 1024
    assert round(plan.parameters / 1e9, 3) == billions
    # 12 l h^2 (1 + 13 / 12h) + (V + s) h + 2h, written out (Narayanan et al. 2021, eq. 2, and the final norm)
    by_hand = 12 * layers * hidden**2 + 13 * layers * hidden + (51200 + 1024) * hidden + 2 * hidden
    assert plan.parameters == by_hand


@pytest.mark.parametrize(
    ("name", "gpus"),
    [
        ("gpt-355m", 64),
        ("gpt-2.5b", 128),
        ("gpt-8.3b", 512),
        ("bert-336m", 128),
        ("bert-1.3b", 256),
        ("bert-3.9b", 512),
    ],
)
def test_the_trained_models_fit_the_gpus_they_were_trained_on(name: str, gpus: int) -> None:
    """Shoeybi et al. 2019, tables 2 and 4; the batches of section 4.2 in one pass."""
    recipe = resolve_recipe(f"paper/{name}", verb="plan", world_size=gpus)
    batch = make_plan(recipe, gpus).batch
    assert batch.global_batch_size == (512 if name.startswith("gpt") else 1024)
    assert batch.gradient_accumulation_steps == 1


# fine-tuning takes its model from `init_from`
PRETRAINING = [
    name
    for name in builtin_names()
    if re.match("(gpt|bert|t5|paper|debug|demo)/", name) and resolve_recipe(name).task is None
]


@pytest.mark.parametrize("name", PRETRAINING)
def test_every_pretraining_recipe_can_be_planned(name: str) -> None:
    found = resolve_recipe(name)
    unknown = found.model.vocab_size is None and found.tokenizer != "bytes"  # left to the tokenizer of the command
    recipe = resolve_recipe(name, ["model.vocab_size=8192"] if unknown else [], verb="plan")
    plan = make_plan(recipe, model_parallel_size(recipe), device_tflops=100.0)
    assert plan.parameters == count_parameters(with_vocabulary(recipe).model)
    assert plan.batch.gradient_accumulation_steps >= 1 and plan.seconds and plan.seconds > 0
    assert json.loads(json.dumps(plan.to_dict()))["memory"]["total"] == plan.memory.total
    assert f"{plan.parameters:,}" in as_text(plan)


def test_flops_follow_narayanan_et_al() -> None:
    """Eq. 3 for GPT with full recomputation is 96 B s l h^2 (1 + s/6h + V/16lh); three quarters of it without."""
    recipe = resolve_recipe("gpt/8.3b")
    plan = make_plan(recipe, 8)
    layers, h, s, vocabulary, batch = 72, 3072, 1024, 51200, 512
    published = 72 * batch * s * layers * h**2 * (1 + s / (6 * h) + vocabulary / (12 * layers * h))
    assert plan.flops == pytest.approx(published * plan.steps, rel=1e-6)
    assert plan.tokens_per_step == batch * s


def test_time_estimate() -> None:
    plan = make_plan(resolve_recipe("gpt/355m"), 8, device_tflops=125.0, mfu=0.5)
    assert plan.seconds == pytest.approx(plan.flops / (8 * 125e12 * 0.5))
    assert plan.seconds_per_step == pytest.approx(plan.seconds / 300000)
    assert make_plan(resolve_recipe("gpt/355m"), 8).seconds is None


def test_memory_of_weights_and_optimizer_is_exact_arithmetic() -> None:
    recipe = resolve_recipe("gpt/355m", ["train.micro_batch_size=64"])
    whole = count_parameters(recipe.model)
    plan = make_plan(recipe, 8)
    assert plan.memory.weights == 2 * whole
    assert plan.memory.optimizer == 12 * whole // 8  # ZeRO-1 over 8 data ranks
    assert (
        make_plan(
            recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"zero": 0})}), 8
        ).memory.optimizer
        == 12 * whole
    )


def test_slices_add_up() -> None:
    model = resolve_recipe("gpt/8.3b").model
    replicated = sum(layer.whole.total() for layer in layer_counts(model))
    for tensor in (1, 2, 4, 8):
        assert tensor * (memory.parameters_per_rank(model, tensor) - replicated) + replicated == count_parameters(model)


def test_each_zero_stage_shares_out_one_more_thing() -> None:
    held = [make_plan(resolve_recipe("gpt/355m", [f"parallel.zero={zero}"]), 8).memory for zero in range(4)]
    for zero, (name, before) in enumerate(zip(("optimizer", "gradients", "weights"), held, strict=False), start=1):
        assert getattr(held[zero], name) == getattr(before, name) // 8
        assert held[zero].total == before.total - getattr(before, name) + getattr(before, name) // 8
    text = as_text(make_plan(resolve_recipe("gpt/355m", ["parallel.zero=2"]), 8))
    assert text.count("(ZeRO-2)") == 2


def test_offloaded_state_is_counted_on_the_host() -> None:
    here = make_plan(resolve_recipe("gpt/355m", ["parallel.zero=3"]), 8)
    away = make_plan(resolve_recipe("gpt/355m", ["parallel.zero=3", "parallel.offload=cpu"]), 8)
    assert away.memory.total == here.memory.activations + here.memory.logits
    assert away.memory.total + away.memory.host == here.memory.total
    assert as_text(away).count("on the host") == 3 and "host" not in as_text(here)
    mapped = make_plan(resolve_recipe("gpt/355m", ["parallel.zero=3", "parallel.offload=nvme"]), 8)
    assert mapped.memory.disk == here.memory.optimizer and mapped.memory.total == away.memory.total
    assert mapped.memory.total + mapped.memory.host + mapped.memory.disk == here.memory.total
    assert as_text(mapped).count("on the host") == 2 and as_text(mapped).count("on a disk") == 2


def test_recompute_needs_less_memory() -> None:
    none = make_plan(resolve_recipe("gpt/355m"), 1).memory.activations
    full = make_plan(resolve_recipe("gpt/355m", ["train.recompute=full"]), 1).memory.activations
    assert full < none / 5


def test_vocabulary_comes_from_the_tokenizer() -> None:
    plan = make_plan(resolve_recipe("debug/gpt"), 1)
    assert plan.vocab_size == 257 and plan.padded_vocab_size == 384
    with pytest.raises(UsageError, match="vocabulary"):
        make_plan(resolve_recipe("gpt/10m"), 1)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("bert/base", 110_106_428),  # transformers' BertForPreTraining of bert-base-uncased
        ("bert/336m", 336_297_858),
        ("bert/1.3b", 1_280_739_202),
        ("bert/3.9b", 3_869_260_674),
        ("paper/gpt-8.3b", 8_317_040_640),
        ("paper/bert-340m-readme", 336_297_858),
    ],
)
def test_published_models_have_their_parameters(name: str, parameters: int) -> None:
    """Table 4 of Shoeybi et al. 2019 says 336M, 1.3B and 3.9B; table 2 8.3B."""
    assert make_plan(resolve_recipe(name), 8).parameters == parameters
