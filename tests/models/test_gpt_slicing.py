"""Slicing does not change the model: initial weights, loss, gradients and a training curve at tensor size 1, 2, 4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mlm_cli.config.schema import AttentionSection, ModelSection
from mlm_cli.models.gpt import GPT
from mlm_cli.models.registry import build_gpt
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.random import RandomStreams
from mlm_cli.parallel.shard import gather_full, shard_of

SIZES = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 8, "seq_length": 24}
MODELS = {
    # at 4 ranks the last slice of this vocabulary holds padding alone
    "gpt2": ModelSection(**SIZES, vocab_size=130),
    "llama": ModelSection(
        **SIZES,
        vocab_size=250,
        position="rotary",
        norm="rmsnorm",
        activation="swiglu",
        bias=False,
        num_query_groups=4,
        tie_embeddings=False,
    ),
}


def make_batch(model: ModelSection, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.vocab_size, (3, 25), generator=generator)
    mask = (torch.rand(3, 24, generator=generator) > 0.2).float()
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask}


def gathered(model: GPT, what: Callable[[torch.nn.Parameter], torch.Tensor]) -> dict[str, np.ndarray]:
    return {
        name: gather_full(what(param).detach(), shard_of(param), model.parallel.tensor).clone().numpy()
        for name, param in model.named_parameters()
    }


def train(model_section: ModelSection, parallel: ParallelContext, recompute: bool) -> dict[str, Any]:
    """Everything about a model that must not depend on how it is sliced."""
    model = build_gpt(model_section, parallel, seed=11)
    model.recompute = recompute
    found: dict[str, Any] = {"weights": gathered(model, lambda param: param)}
    model.loss(make_batch(model_section, 0))[0].backward()
    found["grads"] = gathered(model, lambda param: param.grad)
    with torch.no_grad():
        batch = make_batch(model_section, 99)
        found["logits"] = model.gather_logits(model(batch["tokens"])).numpy()
        found["token losses"] = model.token_losses(batch["tokens"], batch["labels"]).numpy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    curve = []
    for step in range(20):
        optimizer.zero_grad()
        loss, _ = model.loss(make_batch(model_section, step % 4))
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    found["curve"] = np.array(curve)
    found["padding"] = max(
        float(np.abs(whole[model_section.vocab_size :]).max(initial=0.0))
        for name, whole in gathered(model, lambda param: param).items()
        if name in ("embedding.word.weight", "head.weight")
    )
    return found


def dropout_repeats(section: ModelSection, parallel: ParallelContext) -> bool:
    """With dropout on, recomputed activations give the very gradients of kept ones, both streams included."""
    section = section.model_copy(update={"hidden_dropout": 0.2, "attention_dropout": 0.2})
    model = build_gpt(section, parallel, seed=3).train()
    grads = []
    for recompute in ("none", "full", "selective"):
        model.set_streams(RandomStreams(parallel, 17))
        model.recompute = recompute == "full"
        for layer in model.layers:
            layer.attention.recompute = recompute == "selective"
        model.zero_grad()
        model.loss(make_batch(section, 0))[0].backward()
        grads.append([param.grad.clone() for param in model.parameters()])
        after = torch.rand(2)
    del after
    return all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*grads, strict=True))


def masks_between_layers(section: ModelSection, parallel: ParallelContext) -> dict[str, Any]:
    """What one rank's dropout hid of the embedding, and gradients of parameters that all ranks hold."""
    section = section.model_copy(update={"hidden_dropout": 0.5})
    model = build_gpt(section, parallel, seed=3).train()
    model.set_streams(RandomStreams(parallel, 17))
    hidden: list[torch.Tensor] = []
    model.embedding.register_forward_hook(lambda module, inputs, out: hidden.append(out == 0))
    model.loss(make_batch(section, 0))[0].backward()
    whole = [param.grad.numpy() for param in model.parameters() if shard_of(param) is None]
    return {"hidden": hidden[0].numpy(), "grads": whole}


def on_rank(rank: int, world_size: int, sequence: bool) -> dict[str, Any]:
    parallel = ParallelContext.create(tensor=world_size, sequence=sequence)
    found: dict[str, Any] = {name: train(section, parallel, False) for name, section in MODELS.items()}
    found["dropout repeats"] = all(dropout_repeats(section, parallel) for section in MODELS.values())
    found["masks"] = masks_between_layers(MODELS["gpt2"], parallel)
    return found


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    """One rank, activations recomputed: also shows that recomputation changes nothing."""
    return {name: train(section, ParallelContext.single(), True) for name, section in MODELS.items()}


def assert_close(mine: np.ndarray, theirs: np.ndarray, what: str) -> None:
    scale = np.abs(theirs).max()
    assert np.abs(mine - theirs).max() <= 1e-5 * scale, f"{what}: {np.abs(mine - theirs).max() / scale}"


@pytest.mark.parametrize(
    ("size", "sequence"),
    [
        pytest.param(2, False, marks=pytest.mark.slow),
        (4, False),
        (2, True),
        pytest.param(4, True, marks=pytest.mark.slow),
    ],
)
def test_slicing_does_not_change_the_model(
    size: int, sequence: bool, run_ranks: Callable[..., list[Any]], reference: Any
) -> None:
    answers = run_ranks(on_rank, size, sequence)
    _check_masks([answer["masks"] for answer in answers], sequence)
    for rank, answer in enumerate(answers):
        assert answer["dropout repeats"]
        for name in MODELS:
            mine, theirs = answer[name], reference[name]
            for key, weight in theirs["weights"].items():
                assert np.array_equal(mine["weights"][key], weight), f"initial {key} differs on rank {rank}"
                assert_close(mine["grads"][key], theirs["grads"][key], f"{name} gradient of {key}")
            assert_close(mine["logits"], theirs["logits"], f"{name} logits")
            assert_close(mine["token losses"], theirs["token losses"], f"{name} token losses")
            np.testing.assert_allclose(mine["curve"], theirs["curve"], rtol=1e-5)
            assert mine["curve"][-1] < mine["curve"][0] - 0.5, "it did not learn"
            assert mine["padding"] == 0.0, "padding rows got a gradient"


def _check_masks(of_ranks: list[dict[str, Any]], sequence: bool) -> None:
    """Ranks that hold the same tokens hide the same; ranks that hold others hide others. Gradients are whole."""
    first, *others = of_ranks
    for other in others:
        assert np.array_equal(first["hidden"], other["hidden"]) != sequence
        assert all(np.array_equal(a, b) for a, b in zip(first["grads"], other["grads"], strict=True))
    share = len(of_ranks) if sequence else 1
    assert first["hidden"].shape[1] == 24 // share and 0.4 < first["hidden"].mean() < 0.6


def test_one_rank_recomputes_with_the_same_dropout() -> None:
    assert all(dropout_repeats(section, ParallelContext.single()) for section in MODELS.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_selective_recomputation_keeps_no_scores(dropout: float) -> None:
    """What is kept for the backward pass no longer grows with the square of the sequence."""
    changes = {"attention": AttentionSection(kernel="fused"), "attention_dropout": dropout}
    section = MODELS["llama"].model_copy(update=changes)
    model = build_gpt(section, ParallelContext.single(), seed=3).train()
    kept: dict[bool, int] = {}
    for recompute in (False, True):
        for layer in model.layers:
            layer.attention.recompute = recompute
        squares: list[tuple[int, ...]] = []

        def pack(tensor: torch.Tensor, squares: list[tuple[int, ...]] = squares) -> torch.Tensor:
            if tensor.shape[-2:] == (24, 24):
                squares.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = model.loss(make_batch(section, 0))
        kept[recompute] = len(squares)
        loss.backward()
    assert kept[False] >= section.num_layers and kept[True] == 0
