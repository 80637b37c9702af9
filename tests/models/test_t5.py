"""T5's own rules, and that neither slices nor stages change it. (Its equal in transformers: ``test_hub_t5.py``.)"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models.t5_models import SECTIONS, SIZES, make_batch, shake

from mlm_cli.config.schema import AttentionSection, ModelSection
from mlm_cli.launch.memory import parameters_per_rank
from mlm_cli.models.attention import Attention
from mlm_cli.models.count import count_parameters, flops_per_token, layer_counts, parameter_parts
from mlm_cli.models.registry import build_model
from mlm_cli.models.relative import RelativeBias, buckets_of
from mlm_cli.models.stages import layer_costs
from mlm_cli.models.t5 import T5, t5_layer_specs
from mlm_cli.parallel.context import Group, ParallelContext
from mlm_cli.parallel.random import RandomStreams
from mlm_cli.parallel.shard import gather_full, shard_of

ONE = ParallelContext.single()


def t5(kind: str, parallel: ParallelContext = ONE) -> T5:
    built = build_model(SECTIONS[kind], parallel, seed=11)
    assert isinstance(built, T5)
    return built


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 16), (12, 60), (64, 512)])
def test_buckets_are_those_of_transformers(buckets: int, farthest: int, both_ways: bool) -> None:
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = torch.arange(-1500, 1500)
    theirs = modeling.T5Attention._relative_position_bucket(distance, both_ways, buckets, farthest)
    assert buckets_of(distance, buckets, farthest, both_ways=both_ways).equal(theirs)


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 9), (5, 12), (1, 1)])
def test_biases_and_their_gradient(queries: int, keys: int, both_ways: bool) -> None:
    """Spread from distances to pairs, against a table looked up for each pair."""
    table = RelativeBias(SECTIONS["v1.0"], ONE, torch.float32, both_ways=both_ways)
    with torch.no_grad():
        table.weight.normal_()
    distance = torch.arange(keys) - torch.arange(queries)[:, None]
    plain = table.weight[buckets_of(distance, 8, 16, both_ways=both_ways)].permute(2, 0, 1)[None]
    hidden = (distance > 0) & (not both_ways)
    biases = table(queries, keys)
    torch.testing.assert_close(biases, plain.masked_fill(hidden, -math.inf))
    weights = torch.randn(1, 8, queries, keys).masked_fill(hidden, 0)
    found, expected = (
        torch.autograd.grad((b.masked_fill(hidden, 0) * weights).sum(), table.weight)[0] for b in (biases, plain)
    )
    torch.testing.assert_close(found, expected)
    last = table.at(torch.tensor([queries - 1, 0]), keys)
    torch.testing.assert_close(last[0, :, 0], biases[0, :, queries - 1])
    assert table.at(torch.zeros(1, dtype=torch.long), keys).equal(last[1:])


@pytest.mark.parametrize("kind", SECTIONS)
def test_counts_equal_the_built_model(kind: str) -> None:
    section = SECTIONS[kind]
    built = build_model(section, ParallelContext(device=torch.device("meta")), init=False)
    assert count_parameters(section) == sum(param.numel() for param in built.parameters())
    assert count_parameters(section) == sum(parameter_parts(section).values())
    table = section.relative_buckets * section.num_attention_heads
    for layer in layer_counts(section):
        found = sum(param.numel() for param in built.get_submodule(layer.name).parameters())
        assert layer.held(1) == found + table * (layer.name in ("encoder.0", "decoder.0")), layer.name


def test_published_sizes() -> None:
    """Raffel et al. 2020, section 3.1.1 and footnote; exact counts as transformers opens the published folders."""
    small = {"hidden_size": 512, "num_attention_heads": 8, "head_dim": 64, "ffn_hidden_size": 2048, "num_layers": 6}
    rest = {**SIZES, "relative_buckets": 32, "relative_max_distance": 128, "vocab_size": 32128, "seq_length": 512}
    rest.pop("decoder_seq_length")
    assert count_parameters(ModelSection(**{**rest, **small}, activation="relu")) == 60_506_624
    newer = {**small, "num_layers": 8, "num_attention_heads": 6, "ffn_hidden_size": 1024}
    assert count_parameters(ModelSection(**{**rest, **newer}, activation="geglu", tie_embeddings=False)) == 76_961_152


@pytest.mark.parametrize("kind", SECTIONS)
def test_flops_are_those_torch_counts(kind: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    section = SECTIONS[kind].model_copy(update={"attention": AttentionSection(kernel="reference"), "vocab_size": 128})
    batch = make_batch(section, 0, full=True)
    with FlopCounterMode(display=False) as counter:
        build_model(section, ONE).loss(batch)[0].backward()
    tokens = batch["tokens"].numel() + batch["decoder_tokens"].numel()
    assert counter.get_total_flops() / tokens == pytest.approx(flops_per_token(section), rel=1e-9)


def test_initial_sums_have_the_variance_of_their_inputs() -> None:
    """Queries times keys without scaling: scores of variance one, from the deviations of each block of rows."""
    section = ModelSection(**{**SIZES, "hidden_size": 512, "head_dim": 64, "ffn_hidden_size": 2048})
    weights = dict(build_model(section, ONE).named_parameters())
    query, key, value = weights["encoder.0.attention.qkv.weight"].split(512)
    found = {
        "query": (query, (512 * 64) ** -0.5),
        "key": (key, 512**-0.5),
        "value": (value, 512**-0.5),
        "cross key": (weights["decoder.1.cross.kv.weight"][:512], 512**-0.5),
        "cross query": (weights["decoder.1.cross.query.weight"], (512 * 64) ** -0.5),
        "attention out": (weights["decoder.0.attention.out.weight"], 512**-0.5),
        "up": (weights["decoder.0.mlp.up.weight"], 512**-0.5),
        "down": (weights["decoder.0.mlp.down.weight"], 2048**-0.5),
        "words": (weights["embedding.word.weight"][:130], 1.0),
    }
    for name, (weight, std) in found.items():
        assert weight.std().item() == pytest.approx(std, rel=0.02), name
    assert weights["encoder_bias.weight"].std().item() == pytest.approx(512**-0.5, rel=0.4)


@pytest.mark.parametrize("attention", ["auto", "sdpa", "fused", "reference"])
def test_padding_changes_nothing(attention: str) -> None:
    """A text alone, and with padding behind it: the same loss, whatever the attention."""
    model = build_model(
        SECTIONS["v1.1"].model_copy(update={"attention": AttentionSection(kernel=attention)}), ONE
    ).eval()
    shake(model)
    batch = make_batch(model.config, 4)
    for row in range(3):
        length, targets = int(batch["lengths"][row]), int(batch["loss_mask"][row].sum())
        alone = {
            "tokens": batch["tokens"][row : row + 1, :length],
            "decoder_tokens": batch["decoder_tokens"][row : row + 1, :targets],
            "labels": batch["labels"][row : row + 1, :targets],
        }
        beside = {name: value[row : row + 1].clone() for name, value in batch.items()}
        beside["tokens"][0, length:] = 77
        assert model.loss(beside)[0].item() == pytest.approx(model.loss(alone)[0].item(), rel=1e-5)
    assert model.count_tokens(batch) == 24 + 17 + 9 + 12 + 9 + 5


def test_accuracy_counts_the_likeliest_tokens() -> None:
    model, batch = t5("v1.0").eval(), make_batch(SECTIONS["v1.0"], 1)
    with torch.no_grad():
        logits = model.gather_logits(model(batch["tokens"], batch["decoder_tokens"], lengths=batch["lengths"]))
    right = ((logits.argmax(-1) == batch["labels"]) * batch["loss_mask"]).sum()
    assert model.scores(batch)[1].tolist() == [right.item(), 26.0]


def test_bfloat16_attention_in_blocks_learns_the_biases() -> None:
    """The blocked backward in bfloat16, more than one block of queries, against the float32 reference."""
    section = SECTIONS["v1.0"].model_copy(
        update={"num_layers": 1, "relative_buckets": 32, "relative_max_distance": 128}
    )
    tokens = torch.randint(1, 130, (2, 600))
    batch = {"tokens": tokens, "decoder_tokens": tokens[:, :300], "labels": tokens[:, 1:301]}
    gradients = []
    for dtype, attention in ((torch.float32, "reference"), (torch.bfloat16, "auto"), (torch.float32, "auto")):
        model = build_model(
            section.model_copy(update={"attention": AttentionSection(kernel=attention)}), ONE, dtype=dtype, seed=4
        )
        model.loss(batch)[0].backward()
        gradients.append(torch.cat([p.grad.float().flatten() for n, p in model.named_parameters() if "bias" in n]))
    for found, bound in ((gradients[1], 0.05), (gradients[2], 1e-4)):
        assert (found - gradients[0]).norm() / gradients[0].norm() < bound


def test_recomputation_repeats_dropout() -> None:
    settings = {"hidden_dropout": 0.2, "attention_dropout": 0.2}
    gradients = []
    for again in ("none", "full", "selective"):
        model = build_model(SECTIONS["v1.0"].model_copy(update=settings), ONE, seed=11).train()
        model.recompute = again == "full"
        for module in model.modules():
            if isinstance(module, Attention):
                module.recompute = again == "selective"
        model.set_streams(RandomStreams(ONE, 5))
        model.loss(make_batch(SECTIONS["v1.0"], 0))[0].backward()
        gradients.append([param.grad for param in model.parameters()])
    for plain, *recomputed in zip(*gradients, strict=True):
        assert all(found.equal(plain) for found in recomputed)
    assert gradients[0][0].abs().sum() > 0


def _sliced(rank: int, size: int, kind: str, tensor: int, sequence: bool) -> dict[str, Any]:
    """Everything about a model that must not depend on how it is sliced."""
    parallel = ParallelContext.create(tensor=tensor, sequence=sequence)
    model, section = t5(kind, parallel), SECTIONS[kind]

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
    for step in range(10):
        optimizer.zero_grad()
        loss, _ = model.loss(make_batch(section, step % 2, full=step % 2 == 0))
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return {**found, "curve": np.array(curve)}


@pytest.mark.parametrize(
    ("kind", "tensor", "sequence"),
    [("v1.0", 2, False), ("v1.1", 2, True), pytest.param("v1.1", 4, False, marks=pytest.mark.slow)],
)
def test_slicing_does_not_change_the_model(
    kind: str, tensor: int, sequence: bool, run_ranks: Callable[..., list[Any]]
) -> None:
    expected = _sliced(0, 1, kind, 1, False)
    assert expected["curve"][-1] < expected["curve"][0]
    for found in run_ranks(_sliced, tensor, kind, tensor, sequence):
        for name, weight in expected["weights"].items():
            np.testing.assert_array_equal(found["weights"][name], weight)
            scale = np.abs(expected["grads"][name]).max()
            np.testing.assert_allclose(found["grads"][name], expected["grads"][name], rtol=0, atol=2e-5 * scale + 1e-8)
        np.testing.assert_allclose(found["scores"], expected["scores"], rtol=1e-5)
        np.testing.assert_allclose(found["curve"], expected["curve"], rtol=2e-5)


@pytest.mark.parametrize("kind", SECTIONS)
def test_stages_hold_the_parameters_of_the_whole_and_the_plan_knows_how_many(kind: str) -> None:
    section = SECTIONS[kind]
    whole = dict(t5(kind).named_parameters())
    for stages in (2, 3, 4):
        owned: list[str] = []
        sizes = []
        for rank in range(stages):
            stage = build_model(section, ParallelContext(pipeline=Group(rank, stages)), seed=11)
            for name, param in stage.named_parameters():
                assert param.equal(whole[name]), f"{name} depends on the stage"
            owned += [name for name, _ in stage.named_parameters() if name not in stage.copies]
            sizes.append(sum(param.numel() for param in stage.parameters()))
        assert sorted(owned) == sorted(whole)
        assert max(sizes) == parameters_per_rank(section, 1, stages)
    assert [spec.cost for spec in t5_layer_specs(section, ONE, torch.float32)] == layer_costs(section)
