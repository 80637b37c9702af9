"""One rank: attention paths, document masks, cached decoding and padding against their plain definitions."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mlm_cli.config.schema import ModelSection
from mlm_cli.models.gpt import GPT
from mlm_cli.models.registry import build_gpt
from mlm_cli.parallel.context import ParallelContext

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 48,
    "vocab_size": 200,
}
LLAMA: dict[str, Any] = {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2 untied, exact gelu": {"tie_embeddings": False, "activation": "gelu_erf"},
    "llama": LLAMA,
    "llama grouped": {**LLAMA, "num_query_groups": 2, "head_dim": 24, "tie_embeddings": False},
    "one key head": {**LLAMA, "num_query_groups": 1, "bias": True},
}


def make(kind: str, **changes: Any) -> GPT:
    model = build_gpt(ModelSection(**{**SIZES, **KINDS[kind], **changes}), ParallelContext.single(), seed=5)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for param in model.parameters():  # far from the quiet start: biases and norms matter, attention has opinions
            param.add_(torch.empty_like(param).normal_(0, 0.1, generator=generator))
    return model.eval()


def random_tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "fused"])
@pytest.mark.parametrize("documents", [False, True], ids=["causal", "documents"])
def test_attention_paths_agree_with_the_reference(kind: str, attention: str, documents: bool) -> None:
    tokens, labels = random_tokens(2, 20), random_tokens(2, 20, seed=2)
    batch = {"tokens": tokens, "labels": labels}
    if documents:
        batch["segments"] = torch.tensor([[0] * 7 + [1] * 13, [0] * 12 + [1] * 5 + [2] * 3])
    results = []
    for path in (attention, "reference"):
        model = make(kind, attention=path)
        loss, _ = model.loss(batch)
        loss.backward()
        results.append((loss, {name: param.grad for name, param in model.named_parameters()}))
    assert results[0][0].item() == pytest.approx(results[1][0].item(), rel=1e-6)
    for name, grad in results[1][1].items():
        torch.testing.assert_close(results[0][1][name], grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_equals_torch_over_the_unpadded_vocabulary(kind: str) -> None:
    model, tokens, labels = make(kind), random_tokens(2, 20), random_tokens(2, 20, seed=2)
    logits = model.gather_logits(model(tokens))
    assert logits.shape == (2, 20, 200)
    loss, count = model.loss({"tokens": tokens, "labels": labels})
    assert count == 40
    assert loss.item() == pytest.approx(
        F.cross_entropy(logits.double().flatten(0, 1), labels.flatten()).item(), rel=1e-6
    )
    each = model.token_losses(tokens, labels)
    torch.testing.assert_close(each.mean(), loss.detach(), rtol=1e-6, atol=0)


def test_loss_mask_weighs_tokens() -> None:
    model, tokens, labels = make("gpt2"), random_tokens(2, 20), random_tokens(2, 20, seed=2)
    mask = torch.zeros(2, 20)
    mask[0, 3:9] = 1
    loss, count = model.loss({"tokens": tokens, "labels": labels, "loss_mask": mask})
    assert count == 6
    torch.testing.assert_close(loss.detach(), model.token_losses(tokens, labels)[0, 3:9].mean())
    loss, count = model.loss({"tokens": tokens, "labels": labels, "loss_mask": torch.zeros(2, 20)})
    assert (loss.item(), count.item()) == (0.0, 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_documents_equal_separate_ones(kind: str) -> None:
    """A packed sample with restarted positions gives what each document gives alone."""
    model, tokens = make(kind), random_tokens(1, 30)
    cuts = [0, 11, 13, 30]
    segments = torch.cat([torch.full((1, b - a), i) for i, (a, b) in enumerate(itertools.pairwise(cuts))], 1)
    positions = torch.cat([torch.arange(b - a)[None] for a, b in itertools.pairwise(cuts)], 1)
    packed = model(tokens, positions=positions, segments=segments)
    alone = torch.cat([model(tokens[:, a:b]) for a, b in itertools.pairwise(cuts)], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(packed, model(tokens), atol=1e-2), "the mask changed nothing"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "fused", "reference"])
@torch.no_grad()
def test_cached_decoding_equals_the_whole_pass(kind: str, attention: str) -> None:
    model, tokens = make(kind, attention=attention), random_tokens(2, 24)
    whole = model(tokens)
    cache = model.new_cache(2, 24)
    parts = [model(part, cache=cache) for part in tokens.split([9, 1, 1, 6, 1, 6], 1)]
    assert cache.length == 24
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    cache.truncate(9)
    torch.testing.assert_close(model(tokens[:, 9:12], cache=cache), whole[:, 9:12], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "fused", "reference"])
@torch.no_grad()
def test_left_padded_rows_equal_rows_alone(kind: str, attention: str) -> None:
    model = make(kind, attention=attention)
    rows = [random_tokens(1, length, seed=length) for length in (5, 12, 1)]
    longest, more = 12, 6
    start = torch.tensor([longest - row.shape[1] for row in rows])
    padded = torch.cat([F.pad(row, (longest - row.shape[1], 0)) for row in rows])
    follow = random_tokens(3, more, seed=77)
    cache = model.new_cache(3, longest + more, start=start)
    first = model(padded, cache=cache)
    after = [model(follow[:, i : i + 1], cache=cache) for i in range(more)]
    assert torch.isfinite(first).all()
    for i, row in enumerate(rows):
        alone = model(torch.cat([row, follow[i : i + 1]], 1))
        mine = torch.cat([first[i : i + 1, start[i] :], *(step[i : i + 1] for step in after)], 1)
        torch.testing.assert_close(mine, alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_cache_rows_can_leave_and_fork() -> None:
    model, tokens = make("llama grouped"), random_tokens(3, 10)
    cache = model.new_cache(3, 16, start=torch.tensor([0, 4, 2]))
    model(tokens, cache=cache)
    chosen = torch.tensor([2, 0, 2])
    smaller = cache.select(chosen)
    follow = random_tokens(3, 1, seed=4)
    expected = model(follow, cache=cache)
    mine = model(follow[chosen], cache=smaller)
    torch.testing.assert_close(mine[1], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine[0], expected[2], rtol=1e-4, atol=1e-5)
    assert mine[0].equal(mine[2])


@pytest.mark.parametrize("kind", ["gpt2", "llama grouped"])
def test_bfloat16_is_close_to_float32(kind: str) -> None:
    tokens, labels = random_tokens(2, 40), random_tokens(2, 40, seed=2)
    exact = make(kind)
    coarse = build_gpt(exact.config, ParallelContext.single(), dtype=torch.bfloat16, init=False)
    coarse.load_state_dict(exact.state_dict())
    losses = []
    for model in (exact, coarse):
        loss, _ = model.loss({"tokens": tokens, "labels": labels})
        loss.backward()
        losses.append(loss.item())
        assert loss.dtype == torch.float32
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    for (name, a), b in zip(exact.named_parameters(), coarse.parameters(), strict=True):
        assert b.grad.dtype == torch.bfloat16
        assert (a.grad - b.grad).norm() < 0.05 * a.grad.norm() + 1e-4, name


def test_residual_projections_start_smaller() -> None:
    model = build_gpt(ModelSection(**{**SIZES, "num_layers": 8, "hidden_size": 128}), ParallelContext.single())
    std = {
        name: param.std().item() for name, param in model.named_parameters() if "layers.3" in name and param.dim() == 2
    }
    assert std["layers.3.attention.qkv.weight"] == pytest.approx(0.02, rel=0.05)
    assert std["layers.3.mlp.up.weight"] == pytest.approx(0.02, rel=0.05)
    assert std["layers.3.attention.out.weight"] == pytest.approx(0.02 / 4, rel=0.05)
    assert std["layers.3.mlp.down.weight"] == pytest.approx(0.02 / 4, rel=0.05)
