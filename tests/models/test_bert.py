"""BERT's own rules, and that slicing does not change it. Its equal in transformers: `checkpoint/test_hub_bert.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models.bert_models import SECTIONS, make_batch, shake

from mlm_cli.config.schema import AttentionSection, ModelSection
from mlm_cli.models.bert import Bert
from mlm_cli.models.count import count_parameters, layer_counts, parameter_parts
from mlm_cli.models.registry import build_model
from mlm_cli.parallel.context import Group, ParallelContext
from mlm_cli.parallel.shard import gather_full, shard_of

ONE = ParallelContext.single()


def bert(kind: str, parallel: ParallelContext = ONE) -> Bert:
    built = build_model(SECTIONS[kind], parallel, seed=11)
    assert isinstance(built, Bert)
    return built


@pytest.mark.parametrize("kind", SECTIONS)
def test_counts_equal_the_built_model(kind: str) -> None:
    section = SECTIONS[kind]
    built = build_model(section, ParallelContext(device=torch.device("meta")), init=False)
    assert count_parameters(section) == sum(param.numel() for param in built.parameters())
    assert count_parameters(section) == sum(parameter_parts(section).values())
    for layer in layer_counts(section):
        module = built.get_submodule(layer.name)
        assert layer.held(1) == sum(param.numel() for param in module.parameters()), layer.name


def test_flops_are_those_torch_counts() -> None:
    """An outside count, with the masked share that the formula assumes: 15 of 100 tokens."""
    from torch.utils.flop_counter import FlopCounterMode

    from mlm_cli.models.count import flops_per_token

    model = ModelSection(
        family="bert", num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=100, vocab_size=256,
        num_token_types=2, attention="reference",
    )  # fmt: skip
    built = build_model(model, ONE)
    tokens = torch.randint(0, 256, (2, 100))
    batch = {
        "tokens": tokens,
        "masked_positions": torch.arange(15).expand(2, 15),
        "labels": tokens[:, :15],
        "loss_mask": torch.ones(2, 15),
    }
    with FlopCounterMode(display=False) as counter:
        built.loss(batch)[0].backward()
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(flops_per_token(model), rel=1e-9)


@pytest.mark.parametrize("attention", ["auto", "sdpa", "fused", "reference"])
@pytest.mark.parametrize("kind", ["original", "megatron"])
def test_padding_changes_nothing(kind: str, attention: str) -> None:
    """A text alone, and with padding behind it: the same states and gradients, whatever the attention."""
    model = build_model(SECTIONS[kind].model_copy(update={"attention": AttentionSection(kernel=attention)}), ONE).eval()
    assert isinstance(model, Bert)
    shake(model)
    tokens, types = torch.randint(1, 130, (2, 9)), torch.zeros(2, 24, dtype=torch.long)
    padded = torch.cat([tokens, torch.randint(1, 130, (2, 15))], 1)
    alone = model.hidden(tokens)
    beside = model.hidden(padded, lengths=torch.tensor([9, 9]), token_types=types)[:, :9]
    torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-5)
    gradients = []
    for states in (alone, beside):
        model.zero_grad()
        states.square().sum().backward()
        gradients.append(model.embedding.word.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("full", [True, False])
def test_bfloat16_attention_in_blocks_sees_both_ways(full: bool) -> None:
    """The blocked backward of bfloat16 on the CPU against the float32 reference, more than one block of queries."""
    settings = {"seq_length": 600, "attention": "auto", "num_layers": 1}
    section = SECTIONS["megatron"].model_copy(update=settings)
    tokens = torch.randint(1, 130, (2, 600))
    lengths = torch.tensor([600, 600 if full else 333])
    gradients = []
    for dtype, attention in ((torch.float32, "reference"), (torch.bfloat16, "auto")):
        changed = section.model_copy(update={"attention": AttentionSection(kernel=attention)})
        model = build_model(changed, ONE, dtype=dtype, seed=4)
        assert isinstance(model, Bert)
        model.hidden(tokens, lengths=lengths)[:, :300].float().square().sum().backward()
        gradients.append(model.layers[0].attention.qkv.weight.grad.float())
    difference = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert difference < 0.03


def test_the_loss_is_over_masked_words_alone() -> None:
    model, batch = bert("words only"), make_batch(SECTIONS["words only"], 2)
    loss, count = model.loss(batch)
    changed = {**batch, "labels": torch.where(batch["loss_mask"] > 0, batch["labels"], 7)}
    assert count == 9 and model.loss(changed)[0] == loss
    with torch.no_grad():
        logits = model(batch["tokens"], lengths=batch["lengths"], token_types=batch["token_types"])[..., :130]
    rows = torch.arange(3)[:, None].expand(3, 4)[batch["loss_mask"] > 0]
    places, words = (batch[name][batch["loss_mask"] > 0] for name in ("masked_positions", "labels"))
    expected = torch.nn.functional.cross_entropy(logits[rows, places].double(), words)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    scores = model.scores(batch)
    right = (logits[rows, places].argmax(-1) == words).sum()
    assert scores.tolist() == [pytest.approx([expected.item() * 9, 9]), [right.item(), 9]]


def _sliced(rank: int, size: int, kind: str, tensor: int, sequence: bool) -> dict[str, Any]:
    """Everything about a model that must not depend on how it is sliced."""
    parallel = ParallelContext.create(tensor=tensor, sequence=sequence)
    model, section = bert(kind, parallel), SECTIONS[kind]

    def gathered(what: Callable[[Any], torch.Tensor]) -> dict[str, np.ndarray]:
        return {
            name: gather_full(what(param).detach(), shard_of(param), parallel.tensor).clone().numpy()
            for name, param in model.named_parameters()
        }

    found: dict[str, Any] = {"weights": gathered(lambda param: param)}
    model.loss(make_batch(section, 0))[0].backward()
    found["grads"] = gathered(lambda param: param.grad)
    found["scores"] = model.scores(make_batch(section, 9)).numpy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    curve = []
    for step in range(20):
        optimizer.zero_grad()
        loss, _ = model.loss(make_batch(section, step % 4, full=step % 2 == 0))
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return {**found, "curve": np.array(curve)}


@pytest.mark.parametrize(
    ("kind", "tensor", "sequence"),
    [
        ("original", 2, False),
        pytest.param("megatron", 4, False, marks=pytest.mark.slow),
        ("megatron untied", 2, True),
        ("original", 2, True),
    ],
)
def test_slicing_does_not_change_the_model(
    kind: str, tensor: int, sequence: bool, run_ranks: Callable[..., list[Any]]
) -> None:
    expected = _sliced(0, 1, kind, 1, False)
    assert expected["curve"][-1] < expected["curve"][0] - 1
    for found in run_ranks(_sliced, tensor, kind, tensor, sequence):
        for name, weight in expected["weights"].items():
            np.testing.assert_array_equal(found["weights"][name], weight)
            scale = np.abs(expected["grads"][name]).max()
            np.testing.assert_allclose(found["grads"][name], expected["grads"][name], rtol=0, atol=1e-5 * scale + 1e-8)
        np.testing.assert_allclose(found["scores"], expected["scores"], rtol=1e-5)
        np.testing.assert_allclose(found["curve"], expected["curve"], rtol=1e-5)


def test_stages_hold_the_parameters_of_the_whole() -> None:
    section = SECTIONS["megatron"]
    whole = dict(build_model(section, ONE).named_parameters())
    names: list[str] = []
    for rank in range(3):
        for name, param in build_model(section, ParallelContext(pipeline=Group(rank, 3))).named_parameters():
            assert param.equal(whole[name]), f"{name} depends on the stage"
            names.append(name)
    assert sorted(names) == sorted([*whole, "embedding.word.weight"])
