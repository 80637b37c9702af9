"""The contrastive loss: equal to the paper's formula in float64, in the model's gradient, the same on sliced layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mlm_cli.config.schema import ModelSection
from mlm_cli.generation.step_plan import StepPlan
from mlm_cli.models import contrast
from mlm_cli.models.contrast import Contrast, contrast_statistics, contrastive_loss
from mlm_cli.models.extra_loss import scale_losses
from mlm_cli.models.registry import build_model
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.shard import gather_full, shard_of
from tests.models import t5_models

ONE = ParallelContext.single()
GPT = ModelSection(num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=24, vocab_size=130)
SECTIONS = {"gpt": GPT, "t5": t5_models.SECTIONS["v1.0"]}
Batch = dict[str, torch.Tensor]


def by_hand(
    hidden: torch.Tensor, margin: float, real: torch.Tensor | None = None, segments: torch.Tensor | None = None
) -> torch.Tensor:
    """Equation 2 of the paper, pair by pair, as the mean over the texts."""
    total = hidden.new_zeros(())
    for text in range(hidden.shape[0]):
        excess = []
        for i in range(hidden.shape[1]):
            for j in range(hidden.shape[1]):
                if i == j or (real is not None and not (real[text, i] and real[text, j])):
                    continue
                if segments is not None and segments[text, i] != segments[text, j]:
                    continue
                own = F.cosine_similarity(hidden[text, i], hidden[text, i], dim=0)
                other = F.cosine_similarity(hidden[text, i], hidden[text, j], dim=0)
                excess.append(torch.clamp(margin - own + other, min=0))
        if excess:
            total = total + torch.stack(excess).mean()
    return total / hidden.shape[0]


def states(b: int, s: int, h: int, seed: int = 1) -> torch.Tensor:
    """Random states that lean to one side, so that some pairs are close and some are not."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(b, s, h, generator=generator) + 2.0 * torch.randn(h, generator=generator)


@pytest.mark.parametrize("margin", [0.2, 0.5, 1.0, 1.7])
@pytest.mark.parametrize("block", [1 << 22, 40])
def test_the_formula_of_the_paper_and_its_gradient(margin: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrast, "_BLOCK", block)  # the small one: two rows of two texts at a time, and one left over
    hidden = states(2, 9, 6)
    lengths, segments = torch.tensor([9, 5]), torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    real = torch.arange(9) < lengths[:, None]
    for mask, documents in ((None, None), (real, None), (None, segments), (real, segments)):
        ours, theirs = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
        loss = contrastive_loss(ours, margin, real=mask, segments=documents)
        expected = by_hand(theirs, margin, mask, documents)
        (3.0 * loss).backward()
        (3.0 * expected).backward()
        assert expected > 0
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-7)


def test_texts_without_pairs_and_states_without_length() -> None:
    for hidden, real in (
        (states(2, 1, 4), None),
        (states(2, 3, 4), torch.tensor([[True, False, False]] * 2)),
        (torch.zeros(1, 3, 4), None),
    ):
        hidden.requires_grad_()
        loss = contrastive_loss(hidden, 0.5, real=real)
        loss.backward()
        assert loss == 0 and hidden.grad is not None and not hidden.grad.any()


def test_small_gradients_survive_float16() -> None:
    """Unscaled they are below what float16 can hold; the scale of the loss comes first."""
    hidden = (states(1, 1024, 8) * 30).half().requires_grad_()
    layer = Contrast(0.5)
    layer.loss_scale = 65536.0
    layer(hidden).backward(torch.zeros_like(hidden))
    exact = hidden.detach().double().requires_grad_()
    (contrastive_loss(exact.float(), 0.5) * 65536.0).backward()
    assert hidden.grad is not None and exact.grad is not None
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=2e-3, atol=1e-6)


def make_batch(kind: str, seed: int) -> Batch:
    if kind == "t5":
        return t5_models.make_batch(SECTIONS["t5"], seed)
    tokens = torch.randint(0, 130, (3, 25), generator=torch.Generator().manual_seed(seed))
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "lengths": torch.tensor([24, 17, 2])}
    return batch | {"loss_mask": (torch.arange(24) < batch["lengths"][:, None]).float()}


def build(kind: str, margin: float, parallel: ParallelContext = ONE, dtype: torch.dtype = torch.float32) -> Any:
    model = build_model(SECTIONS[kind], parallel, seed=3, dtype=dtype).train()
    model.contrast = Contrast(margin) if margin else None
    return model


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("kind", SECTIONS)
def test_the_gradient_is_that_of_both_losses_and_the_loss_told_that_of_the_words(kind: str) -> None:
    batch, scale = make_batch(kind, 1), 0.25
    model = build(kind, 0.9)
    scale_losses(model, scale)
    loss, count = model.loss(batch)
    (loss * scale).backward()
    plain = build(kind, 0)
    hidden = plain.run(batch["tokens"], plain.info(batch))
    words, expected_count = plain.loss_of(hidden, batch)
    real = torch.arange(24) < batch["lengths"][:, None] if kind == "gpt" else batch["loss_mask"] > 0
    further = contrastive_loss(hidden, 0.9, real=real)
    ((words + further) * scale).backward()
    assert loss == words and count == expected_count and further > 0
    expected = gradients(plain)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-7, msg=name)
    told = contrast_statistics(model, ONE)
    assert told == {"contrastive_loss": pytest.approx(further.item())}
    assert contrast_statistics(model, ONE) == {}
    model.eval()
    assert model.loss(batch)[0] == loss and contrast_statistics(model, ONE) == {}


def test_documents_of_a_sample_are_apart() -> None:
    """Where attention is (``data.mask_documents``), so are the pairs."""
    batch = make_batch("gpt", 1) | {"segments": (torch.arange(24) // 9).repeat(3, 1)}
    model, plain = build("gpt", 0.9), build("gpt", 0)
    model.loss(batch)
    hidden, real = plain.run(batch["tokens"], plain.info(batch)), torch.arange(24) < batch["lengths"][:, None]
    expected, mixed = (contrastive_loss(hidden, 0.9, real=real, segments=s) for s in (batch["segments"], None))
    assert contrast_statistics(model, ONE)["contrastive_loss"] == pytest.approx(expected.item())
    assert expected.item() != pytest.approx(mixed.item(), rel=1e-3)


def _sliced(rank: int, size: int, kind: str, sequence: bool) -> dict[str, Any]:
    parallel = ParallelContext.create(tensor=size, sequence=sequence)
    model = build(kind, 0.9, parallel)
    batch = make_batch(kind, 1)
    model.loss(batch)[0].backward()
    found = {}
    for name, param in model.named_parameters():
        assert param.grad is not None
        found[name] = gather_full(param.grad, shard_of(param), parallel.tensor).tolist()
    return found | contrast_statistics(model, parallel)


@pytest.mark.parametrize(("kind", "sequence"), [("gpt", False), ("gpt", True), ("t5", False)])
def test_slices_give_the_gradients_of_the_whole(kind: str, sequence: bool, run_ranks: Callable[..., list[Any]]) -> None:
    expected = _sliced(0, 1, kind, False)
    for found in run_ranks(_sliced, 2, kind, sequence):
        for name, grad in found.items():
            torch.testing.assert_close(torch.tensor(grad), torch.tensor(expected[name]), rtol=1e-4, atol=1e-6, msg=name)


def test_the_fused_decoding_step_is_kept() -> None:
    """In an evaluation between steps the loss has nothing to do."""
    plain, contrasted = build("gpt", 0), build("gpt", 0.5)
    if StepPlan.of(plain.eval(), 24) is None:
        pytest.skip("no kernels here")
    assert StepPlan.of(contrasted.eval(), 24) is not None
