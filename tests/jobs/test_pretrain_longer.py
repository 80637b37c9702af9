"""Pretraining goes on at a longer context: sparse attention, scaled rotary or copied learned positions, end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrain_runs import losses, make_recipe, write_data

from mlm_cli.checkpoint.hub import load_model_folder, resolve_model
from mlm_cli.config.resolve import resolve_recipe
from mlm_cli.config.schema import Recipe
from mlm_cli.errors import UsageError
from mlm_cli.jobs import pretrain
from mlm_cli.parallel.context import ParallelContext

ONE = ParallelContext.single()
LOCAL = {"pattern": "local", "block": 8, "window": 16}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "toy", documents=200)


def recipe(data: Path, run: Path, spec: str, steps: int, *overrides: str) -> Recipe:
    common = [
        f"data.path={data}",
        "tokenizer=null",
        "model.vocab_size=96",
        f"train.steps={steps}",
        "evaluate.every=0",
        "log.every=1",
    ]
    return resolve_recipe(spec, [*common, f"output={run}", *overrides])


def test_the_debug_recipe_goes_on_at_four_times_the_context(data: Path, tmp_path: Path) -> None:
    assert pretrain.run(recipe(data, tmp_path / "short", "debug/llama", 40)) == 0
    overrides = [f"init_from={tmp_path / 'short'}"]
    assert pretrain.run(recipe(data, tmp_path / "long", "debug/long", 6, *overrides)) == 0
    before, after = losses(tmp_path / "short"), losses(tmp_path / "long")
    assert after[0] < (before[0] + before[-1]) / 2 < before[0] - 0.1, "it did not begin where the short one ended"
    # the folder says all there is to know
    folder = resolve_model(tmp_path / "long")
    _, section = load_model_folder(folder, ONE)
    assert (section.seq_length, section.attention.pattern, section.attention.window) == (256, "local", 32)
    assert section.rotary_scaling is not None and section.rotary_scaling.type == "ntk"
    assert section.rotary_base == 10000.0
    assert "attend to every token" in (folder / "README.md").read_text()
    # and the run goes on as itself
    assert pretrain.run(recipe(data, tmp_path / "long", "debug/long", 8, *overrides)) == 0
    with pytest.raises(UsageError, match=r"model\.attention\.window: 32 -> 64"):
        pretrain.run(recipe(data, tmp_path / "long", "debug/long", 9, *overrides, "model.attention.window=64"))


def test_learned_positions_are_copied_one_after_the_other(data: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model__attention_dropout": 0.0, "train__steps": 2}
    assert pretrain.run(make_recipe(data, tmp_path / "short", **options)) == 0
    short, _ = load_model_folder(resolve_model(tmp_path / "short"), ONE)
    changes = {"seq_length": 40}
    longer, section = load_model_folder(resolve_model(tmp_path / "short"), ONE, changes=changes)
    stored = short.embedding.position.weight
    assert section.seq_length == 40
    assert longer.embedding.position.weight.equal(torch.cat([stored, stored, stored[:8]]))
    options |= {"model__seq_length": 40, "model__attention": LOCAL, "init_from": str(tmp_path / "short")}
    assert pretrain.run(make_recipe(data, tmp_path / "long", **options)) == 0
    config = json.loads((resolve_model(tmp_path / "long") / "config.json").read_text())
    assert config["n_positions"] == 40 and config["mlm"]["attention"]["pattern"] == "local"


def test_sizes_left_unset_are_not_those_of_the_weights(data: Path, tmp_path: Path) -> None:
    """Else the run would be of another shape than its recipe, and could not be resumed."""
    narrow = ["model.ffn_hidden_size=96", "model.num_query_groups=1"]
    assert pretrain.run(recipe(data, tmp_path / "narrow", "debug/llama", 6, *narrow)) == 0
    overrides = [f"init_from={tmp_path / 'narrow'}", "model.num_query_groups=null"]
    with pytest.raises(UsageError, match=r"num_query_groups: 1 there, 4 in (.|\n)*ffn_hidden_size: 96 there, 192 in"):
        pretrain.run(recipe(data, tmp_path / "wide", "debug/llama", 6, *overrides))
    written_out = ["model.ffn_hidden_size=192", "model.head_dim=16", f"init_from={tmp_path / 'plain'}"]
    assert pretrain.run(recipe(data, tmp_path / "plain", "debug/llama", 6)) == 0
    assert pretrain.run(recipe(data, tmp_path / "same", "debug/llama", 6, *written_out)) == 0


def test_a_pattern_or_a_scaling_is_not_lost_by_silence(data: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model__attention_dropout": 0.0, "train__steps": 1, "model__attention": LOCAL}
    assert pretrain.run(make_recipe(data, tmp_path / "sparse", **options)) == 0
    options |= {"init_from": str(tmp_path / "sparse"), "model__attention": {}}
    with pytest.raises(UsageError, match=r"attention\.pattern: local there, not set in the recipe"):
        pretrain.run(make_recipe(data, tmp_path / "silent", **options))
    options |= {"model__attention": {"pattern": "dense"}}
    assert pretrain.run(make_recipe(data, tmp_path / "dense", **options)) == 0
