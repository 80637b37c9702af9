"""The attention section of a recipe: short and long forms, overrides, and what cannot be combined."""

from __future__ import annotations

import json
import re

import pytest

from mlm_cli.config.checks import check
from mlm_cli.config.resolve import resolve_recipe, write_recipe
from mlm_cli.config.schema import AttentionSection, ModelSection
from mlm_cli.config.shapes import attended_keys, is_sparse
from mlm_cli.errors import UsageError
from mlm_cli.jobs.training_parts import kept_pattern
from mlm_cli.models.count import flops_per_token
from mlm_cli.training.identity import recipe_hash


@pytest.mark.parametrize(
    ("overrides", "kernel", "pattern"),
    [
        (["model.attention=sdpa"], "sdpa", None),
        (["model.attention.pattern=local"], "auto", "local"),
        (["model.attention=sdpa", "model.attention.pattern=local"], "sdpa", "local"),
        (["model.attention.pattern=local", "model.attention=sdpa"], "sdpa", "local"),
        (["model.attention={pattern: bigbird, kernel: fused}"], "fused", "bigbird"),
        (["model.attention.pattern=local", "model.attention=null"], "auto", None),
    ],
)
def test_a_plain_string_is_the_kernel(overrides: list[str], kernel: str, pattern: str | None) -> None:
    found = resolve_recipe("debug/gpt", overrides).model
    assert (found.attention.kernel, found.attention.pattern) == (kernel, pattern)
    assert is_sparse(found) == (pattern is not None)


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("model.attention=spda", "override `model.attention=spda`: `model.attention.kernel` must be one of", "`sdpa`"),
        ("model.attention.pattern=lokal", "`model.attention.pattern` must be one of", "`local`"),
        ("model.attention.windw=3", "`model.attention.windw` is not a recipe key", "`model.attention.window`"),
        ("model.attention.global_tokens=3", "is not a recipe key", "`model.attention.global`"),
        ("model.rotary_scaling.type=yarn", "`model.rotary_scaling.factor` is missing", "model.rotary_scaling.factor="),
    ],
)
def test_a_wrong_key_is_named_with_its_place(override: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_recipe("debug/gpt", [override])
    assert message in str(caught.value) and hint in f"{caught.value} {caught.value.hint}"


def test_a_resolved_recipe_reads_back(tmp_path) -> None:  # type: ignore[no-untyped-def]
    recipe = resolve_recipe("debug/long", ["model.attention.global=5"])
    write_recipe(recipe, tmp_path / "recipe.yaml")
    again = resolve_recipe(str(tmp_path / "recipe.yaml"))
    assert again.model == recipe.model and again.model.attention.global_tokens == 5
    assert resolve_recipe(str(tmp_path / "recipe.yaml"), ["model.rotary_scaling=null"]).model.rotary_scaling is None


@pytest.mark.parametrize(
    ("spec", "overrides", "message"),
    [
        ("debug/long", ["model.attention_dropout=0.1"], "local has no dropout"),
        ("debug/long", ["model.attention.pattern=strided", "model.attention.window=40"], "40 is not a multiple of"),
        ("debug/gpt", ["model.rotary_scaling={type: ntk, factor: 2, original_seq_length: 8}"], "is learned"),
    ],
)
def test_impossible_recipes_and_their_way_out(spec: str, overrides: list[str], message: str) -> None:
    recipe = resolve_recipe(spec, ["data.path=/d/x", *overrides])
    (found,) = check(recipe, verb="pretrain")
    assert re.search(message, found.message) and found.hint is not None
    remedy = re.search(r"`([\w.]+=[^`]+)`", found.hint)
    assert remedy is not None
    mended = resolve_recipe(spec, ["data.path=/d/x", *overrides, remedy.group(1)])
    assert check(mended, verb="pretrain") == []


def test_dropout_is_fine_under_a_mask() -> None:
    overrides = ["data.path=/d/x", "model.attention_dropout=0.1", "model.attention=fused"]
    assert check(resolve_recipe("debug/long", overrides), verb="pretrain") == []


def test_a_pattern_is_of_the_run_and_a_kernel_is_not() -> None:
    hashes = [
        recipe_hash(resolve_recipe("debug/long", overrides))
        for overrides in ([], ["model.attention=sdpa"], ["model.attention.window=64"])
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_fine_tuning_keeps_a_pattern_unless_told_otherwise() -> None:
    local = AttentionSection(pattern="local", window=32)
    assert kept_pattern(AttentionSection(kernel="sdpa"), local) == AttentionSection(
        kernel="sdpa", pattern="local", window=32
    )
    assert kept_pattern(AttentionSection(pattern="dense"), local).pattern == "dense"


def test_work_is_counted_by_the_keys_that_are_seen() -> None:
    dense = ModelSection(vocab_size=100, seq_length=4096)
    local = dense.model_copy(update={"attention": AttentionSection(pattern="local", window=512)})
    assert (attended_keys(dense, 4096), attended_keys(local, 4096), attended_keys(local, 100)) == (4096, 512, 100)
    saved = flops_per_token(dense) - flops_per_token(local)
    assert saved == 6 * 12 * 2 * (4096 - 512) * 768
    assert json.loads(local.model_dump_json())["attention"]["global"] == 64
