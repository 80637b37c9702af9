"""Context ranks: heads are dealt and collected as slicing says; a GPT's loss and gradients are those of one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mlm_cli.config.checks import check
from mlm_cli.config.resolve import resolve_recipe
from mlm_cli.config.schema import ModelSection
from mlm_cli.errors import UsageError
from mlm_cli.models.gpt import GPT
from mlm_cli.models.registry import build_gpt
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.ulysses import collect_heads, deal_heads

SECTION = ModelSection(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=8,
    num_query_groups=4,
    seq_length=24,
    vocab_size=130,
    position="rotary",
    norm="rmsnorm",
    activation="swiglu",
)


def batch_of_documents() -> dict[str, Tensor]:
    """Two samples of several documents each, some tokens not counted; unevenly over the two halves."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, 130, (2, 25), generator=generator)
    segments = (torch.rand(2, 24, generator=generator) > 0.8).int().cumsum(1)
    mask = (torch.rand(2, 24, generator=generator) > 0.1).float()
    mask[:, :12] *= (torch.rand(2, 12, generator=generator) > 0.5).float()
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask, "segments": segments}


def learned(parallel: ParallelContext, dtype: torch.dtype) -> tuple[float, dict[str, np.ndarray], GPT]:
    """Loss and gradients of one rank, as an engine would see them."""
    model = build_gpt(SECTION, parallel, seed=1, dtype=dtype)
    loss, count = model.loss(batch_of_documents())
    assert float(count) == float(batch_of_documents()["loss_mask"].sum())
    loss.backward()
    return loss.item(), {name: p.grad.float().numpy() for name, p in model.named_parameters()}, model


def _on_ranks(rank: int, size: int) -> dict[str, Any]:
    parallel = ParallelContext.create(context=2)
    group = parallel.context
    assert (parallel.data.size, parallel.replicas.size, group.rank) == (1, 2, rank)
    # what each rank gets is what slicing the whole would give it; blocks of 4 and 2 heads
    whole = torch.arange(2 * 8 * 6 * 3, dtype=torch.float32).view(2, 8, 6, 3)
    mine = whole[:, 4 * rank : 4 * rank + 4].clone().requires_grad_()
    heads = deal_heads(mine, group, 4, 2)
    wanted = torch.cat([whole[:, :, 2 * rank : 2 * rank + 2], whole[:, :, 4 + rank : 5 + rank]], 2)
    back = collect_heads(deal_heads(mine, group, 6), group)
    weight = torch.arange(heads.numel(), dtype=torch.float32).view(heads.shape) + 1000 * rank
    (heads * weight).sum().backward()
    found: dict[str, Any] = {
        "heads": torch.equal(heads, wanted),
        "back": torch.equal(back, mine),
        "gradient": mine.grad.numpy(),
        "weight": weight.numpy(),
    }
    for dtype in (torch.float32, torch.bfloat16):
        found[str(dtype)] = learned(parallel, dtype)[:2]
    return found


def test_heads_and_gradients(run_ranks: Callable[..., list[Any]]) -> None:
    answers = run_ranks(_on_ranks, 2)
    assert all(answer["heads"] and answer["back"] for answer in answers)
    # the gradient of a permutation is its inverse: put both ranks' weights back where the heads came from
    whole = np.empty((2, 8, 6, 3), np.float32)
    for rank, answer in enumerate(answers):
        whole[:, :, 2 * rank : 2 * rank + 2] = answer["weight"][:, :, :2]
        whole[:, :, 4 + rank] = answer["weight"][:, :, 2]
    for rank, answer in enumerate(answers):
        assert np.array_equal(answer["gradient"], whole[:, 4 * rank : 4 * rank + 4])
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
        loss, grads, _ = learned(ParallelContext.single(), dtype)
        (first, mine), (second, other) = (answer[str(dtype)] for answer in answers)
        assert first == second and abs(first - loss) < tolerance * loss
        for name, grad in grads.items():
            apart = np.abs((mine[name] + other[name]) / 2 - grad).max()
            assert apart < tolerance * np.abs(grad).max() + 1e-9, f"{name}, {dtype}: {apart}"


GOOD = ["data.path=x", "tokenizer=bytes", "output=o", "model.vocab_size=300"]


@pytest.mark.parametrize(
    ("overrides", "ranks", "words"),
    [
        (["parallel.context=3", "model.seq_length=96"], 3, "cannot be dealt to"),
        (["parallel.context=4", "parallel.tensor=2"], 8, "`parallel.tensor` 2 x `parallel.context` 4 = 8 ranks"),
        (["parallel.context=2", "model.seq_length=63"], 2, "`model.seq_length` 63 cannot be shared out over 2 ranks"),
        (["parallel.context=2"], 1, "`parallel.tensor` 1 x `parallel.context` 2 needs 2 ranks, and there is 1"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_with_a_way_out(overrides: list[str], ranks: int, words: str) -> None:
    recipe = resolve_recipe("debug/gpt", [*GOOD, *overrides])
    found = check(recipe, verb="pretrain", world_size=ranks)
    assert any(words in mistake.message and mistake.hint for mistake in found), [one.message for one in found]


def test_fine_tuning_and_other_families_are_refused() -> None:
    with pytest.raises(UsageError, match=r"`parallel\.context` is for pretraining gpt, not for fine-tuning"):
        resolve_recipe("debug/gpt", [*GOOD, "parallel.context=2"], verb="finetune", world_size=2)
    recipe = resolve_recipe("debug/gpt", [*GOOD, "parallel.context=2", "model.family=bert"])
    assert any("not for `model.family` bert" in mistake.message for mistake in check(recipe, verb="plan"))
