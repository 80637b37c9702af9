"""A mixture of experts: routing equal to DeepSpeed's, answers to a plain loop over tokens, slices to the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mlm_cli.checkpoint.hub import load_model_folder, save_model_folder
from mlm_cli.config.schema import ExpertsSection, ModelSection
from mlm_cli.models.count import count_parameters, flops_per_token, layer_counts
from mlm_cli.models.experts import Experts, route, routing_statistics
from mlm_cli.models.extra_loss import scale_losses
from mlm_cli.models.registry import build_gpt
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.shard import gather_full, shard_of

ONE = ParallelContext.single()
SIZES: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 24, "vocab_size": 130,
}  # fmt: skip
SECTIONS = {
    "top 1": ModelSection(**SIZES, experts=ExpertsSection(num_experts=4)),
    "top 2 every other": ModelSection(**SIZES, experts=ExpertsSection(num_experts=4, top_k=2, every=2)),
    "gated": ModelSection(
        **SIZES, activation="swiglu", norm="rmsnorm", position="rotary", bias=False,
        experts=ExpertsSection(num_experts=8, top_k=2, capacity_factor=0.5),
    ),
}  # fmt: skip


def make_batch(seed: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 130, (3, 25), generator=torch.Generator().manual_seed(seed))
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("factor", [0.3, 1.0, 8.0])
def test_routing_is_that_of_deepspeed(top_k: int, factor: float) -> None:
    moe = pytest.importorskip("deepspeed.moe.sharded_moe")
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(top_k)) * 2
    if top_k == 1:
        loss, weights, _, counts = moe.top1gating(logits.clone(), factor, 4, use_rts=False)
    else:
        loss, weights, _, counts = moe.top2gating(logits.clone(), factor, 4, top2_2nd_expert_sampling=False)
    found = route(logits, top_k=top_k, capacity_factor=factor)
    assert found.capacity == min(weights.shape[2], 50)  # places that no token can have are not made
    assert not weights[:, :, found.capacity :].any()
    weights = weights[:, :, : found.capacity]
    ours = torch.zeros_like(weights)  # [token, expert, place]
    for experts, places, gates in zip(found.experts, found.places, found.gates, strict=True):
        for token in range(50):
            if places[token] < found.capacity:
                ours[token, experts[token], places[token]] += gates[token]
            else:
                assert gates[token] == 0
    if top_k == 1 and factor < 8:  # whom DeepSpeed drops there is left to the ties of `torch.topk`; we drop the last
        assert (ours > 0).sum((0, 2)).equal((weights > 0).sum((0, 2)))
        both = (ours.sum(2) > 0) & (weights.sum(2) > 0)
        torch.testing.assert_close(ours.sum(2)[both], weights.sum(2)[both])
        assert both.sum() > 5
    else:
        torch.testing.assert_close(ours, weights)
    torch.testing.assert_close(found.balance, loss)
    assert found.counts.equal(counts)


@pytest.mark.parametrize("kind", ["top 1", "gated"])
def test_answers_are_those_of_a_loop_over_tokens(kind: str) -> None:
    """Evaluation drops nobody: each token's answer is the weighted sum of its experts', whoever else is there."""
    torch.manual_seed(0)
    block = build_gpt(SECTIONS[kind], ONE).layers[0].mlp.eval()
    assert isinstance(block, Experts)
    with torch.no_grad():
        for param in block.parameters():
            param.add_(0.3 * torch.randn_like(param))
        x = torch.randn(2, 9, 32)
        expected = torch.zeros(2, 9, 32, dtype=torch.float64)
        for b in range(2):
            for s in range(9):
                token = x[b, s].double()
                probs = torch.softmax(block.router.double() @ token, 0)
                top, chosen = probs.topk(block.settings.top_k)
                gates = top if len(top) == 1 else top / top.sum()
                for gate, expert in zip(gates, chosen.tolist(), strict=True):
                    up = block.up[expert].double() @ token
                    if block.up_bias is not None:
                        up = up + block.up_bias[expert].double()
                    if kind == "gated":
                        first, second = up.chunk(2)
                        inner = F.silu(first) * second
                    else:
                        inner = F.gelu(up, approximate="tanh")
                    down = block.down[expert].double() @ inner
                    down = down + block.down_bias[expert].double() if block.down_bias is not None else down
                    expected[b, s] += gate * down
        torch.testing.assert_close(block(x).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", SECTIONS)
def test_counts_equal_the_built_model(kind: str) -> None:
    section = SECTIONS[kind]
    built = build_gpt(section, ParallelContext(device=torch.device("meta")), init=False)
    assert count_parameters(section) == sum(param.numel() for param in built.parameters())
    for layer in layer_counts(section):
        assert layer.held(1) == sum(param.numel() for param in built.get_submodule(layer.name).parameters())
    plain = section.model_copy(update={"experts": None})
    assert flops_per_token(plain) < flops_per_token(section) < 3 * flops_per_token(plain)


def test_the_balance_loss_reaches_the_router_alone_and_at_its_weight() -> None:
    """The gradient of a pass is that of loss + weight * sum of balance losses, times the scale of the backward pass."""
    section = SECTIONS["top 2 every other"]
    weight = 0.7
    heavy = section.model_copy(update={"experts": section.experts.model_copy(update={"balance_loss": weight})})
    gradients = []
    for model_section, scale in ((section.model_copy(update={"experts": section.experts.model_copy(
        update={"balance_loss": 0.0})}), 1.0), (heavy, 1.0), (heavy, 0.25)):  # fmt: skip
        model = build_gpt(model_section, ONE, seed=5).train()
        scale_losses(model, scale)
        (model.loss(make_batch(1))[0] * scale).backward()
        gradients.append(model.layers[1].mlp.router.grad / scale)
    torch.testing.assert_close(gradients[2], gradients[1])
    # by hand: the same balance loss from the layer's own input
    model = build_gpt(heavy, ONE, seed=5).train()
    layer, seen = model.layers[1].mlp, []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model.loss(make_batch(1))
    router = layer.router.detach().clone().requires_grad_()
    balance = route(seen[0].reshape(-1, 32) @ router.t(), top_k=2, capacity_factor=1.25).balance
    (weight * balance).backward()
    torch.testing.assert_close(gradients[1] - gradients[0], router.grad, rtol=1e-4, atol=1e-7)


def test_what_was_routed_is_told_once() -> None:
    model = build_gpt(SECTIONS["gated"], ONE).train()
    model.loss(make_batch(1))
    told = routing_statistics(model, ONE)
    assert told["busiest_expert"] >= 1 and 0 < told["dropped"] < 1 and told["balance"] >= 0.99
    assert routing_statistics(model, ONE) == {}
    model.eval()
    model.loss(make_batch(1))
    assert routing_statistics(model, ONE) == {}


def _told(rank: int, size: int) -> dict[str, float]:
    """Of two passes with batches of their own, by one rank or by two."""
    parallel = ParallelContext.create()
    model = build_gpt(SECTIONS["gated"], parallel, seed=4).train()
    for seed in range(rank, 2, size):
        model.loss(make_batch(seed))
    return routing_statistics(model, parallel)


def test_what_was_routed_is_told_of_all_data_ranks(run_ranks: Callable[..., list[Any]]) -> None:
    expected = _told(0, 1)
    for found in run_ranks(_told, 2):
        assert found == pytest.approx(expected, rel=1e-12)


def _sliced(rank: int, size: int, kind: str, sequence: bool) -> dict[str, Any]:
    parallel = ParallelContext.create(tensor=size, sequence=sequence)
    model = build_gpt(SECTIONS[kind], parallel, seed=11).train()

    def gathered(what: Callable[[Any], torch.Tensor]) -> dict[str, np.ndarray]:
        return {
            name: gather_full(what(param).detach(), shard_of(param), parallel.tensor).clone().numpy()
            for name, param in model.named_parameters()
        }

    found: dict[str, Any] = {"weights": gathered(lambda param: param)}
    model.loss(make_batch(0))[0].backward()
    found["grads"] = gathered(lambda param: param.grad)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    curve = []
    for step in range(20):
        optimizer.zero_grad()
        loss, _ = model.loss(make_batch(step % 4))
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return {**found, "curve": np.array(curve)}


@pytest.mark.parametrize(("kind", "sequence"), [("top 1", False), ("gated", False), ("top 2 every other", True)])
def test_slicing_does_not_change_the_model(kind: str, sequence: bool, run_ranks: Callable[..., list[Any]]) -> None:
    expected = _sliced(0, 1, kind, False)
    for found in run_ranks(_sliced, 2, kind, sequence):
        for name, weight in expected["weights"].items():
            np.testing.assert_array_equal(found["weights"][name], weight)
            scale = np.abs(expected["grads"][name]).max()
            np.testing.assert_allclose(found["grads"][name], expected["grads"][name], rtol=0, atol=1e-5 * scale + 1e-8)
        np.testing.assert_allclose(found["curve"], expected["curve"], rtol=1e-5)


def test_folder_opens_again_and_tells_transformers_what_it_is_not(tmp_path: Any) -> None:
    model = build_gpt(SECTIONS["gated"], ONE).eval()
    save_model_folder(model, tmp_path)
    again, section = load_model_folder(tmp_path, ONE)
    assert section == model.config
    batch = make_batch(3)
    assert again.eval().loss(batch)[0] == model.loss(batch)[0]
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="mlm"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
