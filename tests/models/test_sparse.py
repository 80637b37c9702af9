"""Models with sparse attention: the sparse path against the pattern as a dense mask; whole against cached passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mlm_cli.config.schema import ModelSection
from mlm_cli.errors import UsageError
from mlm_cli.generation.decoder import Decoder
from mlm_cli.generation.step_plan import StepPlan
from mlm_cli.models.attention import SelfAttention
from mlm_cli.models.gpt import GPT
from mlm_cli.models.info import SequenceInfo
from mlm_cli.models.registry import build_model
from mlm_cli.ops.sparse_pattern import PATTERNS
from mlm_cli.parallel.context import ParallelContext

ONE = ParallelContext.single()
SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 64,
    "vocab_size": 200,
}
LLAMA = {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "num_query_groups": 2}
SPARSE = {"block": 4, "window": 8, "global": 3, "random": 1}


def section(pattern: str, kernel: str = "auto", **changes: Any) -> ModelSection:
    return ModelSection(**{**SIZES, "attention": {**SPARSE, "pattern": pattern, "kernel": kernel}, **changes})


def make(pattern: str, kernel: str = "auto", **changes: Any) -> GPT:
    model = build_model(section(pattern, kernel, **changes), ONE, seed=5)
    with torch.no_grad():
        draw = torch.Generator().manual_seed(0)
        for param in model.parameters():
            param.add_(torch.empty_like(param).normal_(0, 0.1, generator=draw))
    return model.eval()


def random_tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "fused"])
@pytest.mark.parametrize("documents", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_loss_and_gradients_equal_dense_attention_under_the_mask(pattern: str, documents: bool, kernel: str) -> None:
    batch = {"tokens": random_tokens(2, 45), "labels": random_tokens(2, 45, seed=2)}
    if documents:
        batch["segments"] = torch.tensor([[0] * 7 + [1] * 38, [0] * 30 + [1] * 12 + [2] * 3])
        batch["positions"] = torch.tensor(
            [[*range(7), *range(38)], [*range(30), *range(12), *range(3)]]
        )  # positions begin anew, and what a query sees does not depend on them
    results = []
    for path in (kernel, "reference"):
        model = make(pattern, path, **LLAMA)
        loss, _ = model.loss(batch)
        loss.backward()
        results.append((loss.item(), {name: param.grad for name, param in model.named_parameters()}))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for name, grad in results[1][1].items():
        torch.testing.assert_close(results[0][1][name], grad, rtol=1e-4, atol=1e-6, msg=name)
    dense = make("dense", **LLAMA).loss(batch)[0].item()
    assert abs(dense - results[0][0]) > 1e-4, "the pattern hid nothing"


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_cached_decoding_equals_the_whole_pass(pattern: str) -> None:
    model, tokens = make(pattern, **LLAMA), random_tokens(2, 40)
    whole = model(tokens)
    cache = model.new_cache(2, 40)
    parts = [model(part, cache=cache) for part in tokens.split([13, 1, 1, 6, 1, 18], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_left_padded_rows_equal_rows_alone(pattern: str) -> None:
    model = make(pattern)
    rows = [random_tokens(1, length, seed=length) for length in (5, 21, 14)]
    longest, more = 21, 12
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


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_the_decoder_of_uneven_rows_equals_the_whole_pass(pattern: str) -> None:
    """The fused decoding step attends to every key: it must stand back."""
    model = make(pattern, **LLAMA)
    assert StepPlan.of(model, 64) is None
    texts = [random_tokens(length, seed=length).tolist() for length in (3, 24, 11)]
    decoder = Decoder(model, 3)
    for text in texts:
        decoder.add(text)
    steps = random_tokens(20, 3, seed=9).tolist()
    found = [decoder.step(step) for step in steps]
    for row, text in enumerate(texts):
        whole = model.gather_logits(model(torch.tensor([text + [step[row] for step in steps]])))[0, len(text) :]
        torch.testing.assert_close(torch.stack([logits[row] for logits in found]), whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_local_step_reads_no_more_keys_than_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = SelfAttention._attend

    def counted(self: SelfAttention, query: Any, key: Any, *rest: Any) -> Any:
        seen.append(key.shape[2])
        return real(self, query, key, *rest)

    monkeypatch.setattr(SelfAttention, "_attend", counted)
    decoder = Decoder(make("local"), 1)
    decoder.add(random_tokens(40).tolist())
    decoder.step([1])
    assert seen == [8, 8]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_both_ways_with_padding(pattern: str) -> None:
    """What an encoder asks for: every token sees every other one that the pattern shows and that is no padding."""
    x, lengths = torch.randn(2, 45, 64), torch.tensor([45, 17])
    found = []
    for kernel in ("auto", "reference"):
        layer = make(pattern, kernel).layers[0].attention
        info = encoder(torch.arange(45), (torch.arange(45) < lengths[:, None])[:, None, None])
        mine = x.clone().requires_grad_()
        out = layer(mine, info)
        (out[0].sum() + out[1, :17].square().sum()).backward()
        found.append((out[0], out[1, :17], mine.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def encoder(positions: torch.Tensor, visible: torch.Tensor) -> SequenceInfo:
    return SequenceInfo(positions, visible=visible, causal=False)


def test_dropout_of_probabilities_is_refused_and_not_left_out() -> None:
    model = make("local", attention_dropout=0.1).train()
    batch = {"tokens": random_tokens(1, 9), "labels": random_tokens(1, 9)}
    with pytest.raises(UsageError, match="has no dropout"):
        model.loss(batch)
    loss, _ = make("local", kernel="fused", attention_dropout=0.5).train().loss(batch)
    assert loss.item() != make("local").loss(batch)[0].item()


def test_recomputed_layers_give_the_same_gradients() -> None:
    batch = {"tokens": random_tokens(2, 33), "labels": random_tokens(2, 33, seed=2)}
    grads = []
    for recompute in (False, True):
        model = make("bigbird").train()
        model.recompute = recompute
        model.loss(batch)[0].backward()
        grads.append([param.grad for param in model.parameters()])
    assert all(a.equal(b) for a, b in zip(*grads, strict=True))
