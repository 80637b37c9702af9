"""Contrastive training from recipe to text: told beside the loss, in any layout the same, tokens less alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mlm_cli.checkpoint.hub import load_model_folder
from mlm_cli.config.checks import check
from mlm_cli.config.schema import Recipe
from mlm_cli.data.indexed import IndexedWriter
from mlm_cli.jobs import pretrain
from mlm_cli.parallel.context import ParallelContext
from tests.jobs.pretrain_runs import fingerprints, make_recipe, metrics, write_data

MARGIN = 0.7
NO_DROPOUT = {"model__hidden_dropout": 0.0, "model__attention_dropout": 0.0}  # masks differ from layout to layout


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("contrastive") / "data").with_name("data_text_document")


def _train(rank: int, size: int, values: dict[str, Any]) -> int:
    return pretrain.run(Recipe.model_validate(values))


def _recipe(data: Path, output: Path, **changes: Any) -> Recipe:
    return make_recipe(data, output, **{"train__contrastive_margin": MARGIN, **changes})


def _told(run: Path) -> list[list[float]]:
    return [[record[key] for key in ("loss", "grad_norm", "contrastive_loss")] for record in metrics(run)]


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("contrastive") / "alone"
    assert pretrain.run(_recipe(data, output)) == 0
    return output


@pytest.mark.parametrize(
    "parallel",
    [
        {"pipeline": 2},
        {"tensor": 2, "sequence": True},
        {"zero": 1},
        {"zero": 3},
    ],
    ids=str,
)
def test_any_layout_learns_the_same(
    parallel: dict[str, Any], data: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    recipe = _recipe(data, tmp_path / "run", **NO_DROPOUT, parallel=parallel)
    assert run_ranks(_train, 2, recipe.model_dump(exclude_unset=True)) == [0, 0]
    assert pretrain.run(_recipe(data, tmp_path / "one", **NO_DROPOUT)) == 0
    assert len(_told(tmp_path / "one")) == 12
    for expected, found in zip(_told(tmp_path / "one"), _told(tmp_path / "run"), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def _walks(prefix: Path) -> Path:
    """Texts that count on in steps of one to five: no token comes twice in a sample."""
    generator = np.random.default_rng(0)
    writer = IndexedWriter(prefix, np.uint16)
    for _ in range(60):
        start, stride = generator.integers(0, 96), generator.integers(1, 6)
        writer.add_sequence(((start + stride * np.arange(90)) % 96).astype(np.uint16))
        writer.end_document()
    writer.finish()
    return prefix


def _mean_cosine(run: Path) -> float:
    """Of the tokens of such texts in the last layer."""
    model, _ = load_model_folder(run / "step-00000060/model", ParallelContext.single())
    texts = (torch.arange(96)[::12, None] + torch.arange(1, 6).repeat(2)[:8, None] * torch.arange(16)) % 96
    with torch.no_grad():
        unit = F.normalize(model.eval().hidden(texts), dim=-1)
    cosines = unit @ unit.transpose(1, 2)
    return float(cosines.masked_select(~torch.eye(16, dtype=torch.bool)).mean())


def test_tokens_grow_less_alike(tmp_path: Path) -> None:
    shared = {"train__steps": 60, "evaluate__every": 60, "schedule__decay_steps": 60, "log__every": 20}
    data, found = _walks(tmp_path / "walks"), {}
    for name, margin in (("plain", 0.0), ("contrastive", 1.0)):
        assert pretrain.run(_recipe(data, tmp_path / name, **shared, train__contrastive_margin=margin)) == 0
        found[name] = metrics(tmp_path / name)
    assert "contrastive_loss" not in found["plain"][-1]
    assert all(0 < record["contrastive_loss"] < 1 for record in found["contrastive"])
    assert _mean_cosine(tmp_path / "contrastive") < 0.5 * _mean_cosine(tmp_path / "plain")
    plain, contrastive = (found[name][-1]["valid_loss"] for name in found)
    assert plain < contrastive < plain + 0.3  # both have learned; it is not for nothing


def test_a_run_that_was_stopped_goes_on_bit_for_bit(data: Path, alone: Path, tmp_path: Path) -> None:
    for steps in (5, 12):
        recipe = _recipe(data, tmp_path / "halves", train__steps=steps)
        assert pretrain.run(recipe) == 0
    ends = [fingerprints(run / "step-00000012") for run in (alone, tmp_path / "halves")]
    weights = [{name: end[name] for name in end if name.endswith(".safetensors")} for end in ends]
    assert weights[0] == weights[1] and len(weights[0]) == 2


def test_where_it_means_nothing_it_is_refused(data: Path, tmp_path: Path) -> None:
    for changes, said in (
        ({"model__family": "bert"}, "`model.family` bert fills gaps"),
        ({"parallel": {"context": 2}}, "`parallel.context` shares these out"),
        ({"task": {"name": "classification", "train": "a", "dev": "b"}}, "`task.name` classification writes nothing"),
    ):
        recipe = _recipe(data, tmp_path, **changes)
        verb = "finetune" if "task" in changes else "pretrain"
        assert any(said in str(mistake) for mistake in check(recipe, verb=verb, world_size=2))
    for task in ("translation", "summarization", "text_generation"):
        recipe = _recipe(data, tmp_path, task={"name": task, "train": "a", "dev": "b"})
        assert not any("contrastive" in str(mistake) for mistake in check(recipe, verb="finetune", world_size=2))
