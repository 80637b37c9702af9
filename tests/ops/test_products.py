"""Products of half-precision matrices where the processor has no instructions for them: in float32, rounded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mlm_cli.config.schema import ModelSection
from mlm_cli.models.registry import build_gpt
from mlm_cli.ops import products
from mlm_cli.parallel.context import ParallelContext

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def no_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_products", lambda dtype: False)


def make(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.usefixtures("no_instructions")
def test_a_product_is_that_of_float64_rounded_once(dtype: torch.dtype) -> None:
    left, right, bias = make(7, 33, dtype=dtype), make(33, 5, dtype=dtype, seed=1), make(5, dtype=dtype, seed=2)
    many, others = make(3, 7, 33, dtype=dtype), make(3, 33, 5, dtype=dtype, seed=1)
    out, added = left.new_empty(7, 5), left.new_empty(7, 5)
    found = {
        "mm": (products.mm(left, right), left.double() @ right.double()),
        "mm, out": (products.mm(left, right, out=out), left.double() @ right.double()),
        "addmm": (products.addmm(bias, left, right, out=added), left.double() @ right.double() + bias.double()),
        "bmm": (products.bmm(many, others), many.double() @ others.double()),
        "linear": (products.linear(left, right.t(), bias), left.double() @ right.double() + bias.double()),
        "one row": (products.linear(left[:1], right.t(), bias), left[:1].double() @ right.double() + bias.double()),
    }
    for name, (product, exact) in found.items():
        assert product.dtype == dtype, name
        # Half a unit in the last place, and what float32 sums lose.
        torch.testing.assert_close(product.double(), exact, rtol=torch.finfo(dtype).eps * 0.51, atol=1e-5, msg=name)
    assert out.data_ptr() == found["mm, out"][0].data_ptr() and added.data_ptr() == found["addmm"][0].data_ptr()


@pytest.mark.usefixtures("no_instructions")
def test_gradients_have_the_type_of_their_factors() -> None:
    factors = [make(4, 6).requires_grad_(), make(3, 6, seed=1).requires_grad_(), make(3, seed=2).requires_grad_()]
    products.linear(*factors).float().square().sum().backward()
    exact = [factor.detach().double().requires_grad_() for factor in factors]
    torch.nn.functional.linear(*exact).square().sum().backward()
    for mine, theirs in zip(factors, exact, strict=True):
        assert mine.grad is not None and theirs.grad is not None and mine.grad.dtype == mine.dtype
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0.03, atol=0.03)


@pytest.mark.usefixtures("no_instructions")
def test_nothing_wide_is_kept_for_the_backward_pass_of_experts() -> None:
    """Their weights are most of a model: copies in float32 would take twice its memory."""
    kept: list[torch.dtype] = []

    def note(x: Tensor) -> Tensor:
        kept.append(x.dtype)
        return x

    left, right = make(3, 4, 6).requires_grad_(), make(3, 6, 5, seed=1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        product = products.bmm(left, right)
    product.float().square().sum().backward()
    assert kept == [torch.bfloat16, torch.bfloat16]
    exact = [factor.detach().double().requires_grad_() for factor in (left, right)]
    torch.bmm(*exact).square().sum().backward()
    for mine, theirs in zip((left, right), exact, strict=True):
        assert mine.grad is not None and theirs.grad is not None and mine.grad.dtype == mine.dtype
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0.03, atol=0.05)


def test_torch_compile_sees_one_graph() -> None:
    def several(x: Tensor, weight: Tensor) -> Tensor:
        return products.widened(products.linear(x, weight)) + products.mm(x, weight.t()).float()

    compiled = torch.compile(several, backend="eager", fullgraph=True)
    x, weight = make(8, 16), make(4, 16, seed=1)
    assert torch.equal(compiled(x, weight), several(x, weight))


def test_float32_and_a_processor_with_instructions_go_straight_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_products", lambda dtype: dtype == torch.bfloat16)
    assert not products.widens(make(2, 2, dtype=torch.float32)) and not products.widens(make(2, 2))
    assert products.widens(make(2, 2, dtype=torch.float16))
    assert not products.widens(torch.empty(2, 2, dtype=torch.float16, device="meta"))


def test_what_torch_says_of_this_processor_is_an_answer() -> None:
    for dtype in HALVES:
        assert products.has_products(dtype) in (True, False)


@pytest.mark.parametrize(
    ("wide", "bf16", "amx", "emulated"),
    [(True, False, False, True), (True, True, False, False), (True, False, True, False), (False, False, False, False)],
)
def test_wide_processors_without_the_instructions_widen(
    monkeypatch: pytest.MonkeyPatch, wide: bool, bf16: bool, amx: bool, emulated: bool
) -> None:
    """AVX-512 alone (Skylake to Ice Lake) has oneDNN's emulation, at a fifth of float32's rate."""
    for name, value in {"avx512": wide, "avx512_bf16": bf16, "amx_tile": amx}.items():
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda value=value: value)
    assert products._emulates_bfloat16() == emulated


MODELS = {
    "dense": {},
    "grouped, rotary": {"position": "rotary", "num_query_groups": 2, "norm": "rmsnorm", "activation": "swiglu"},
    "sparse": {"attention": {"pattern": "local", "window": 8}},
    "bigbird": {"attention": {"pattern": "bigbird", "block": 4}},
    "fused": {"attention": {"kernel": "fused"}},
    "experts": {"experts": {"num_experts": 4}},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.usefixtures("no_instructions")
def test_a_model_learns_as_in_float32(name: str, dtype: torch.dtype) -> None:
    """Loss and gradients of a layer of each kind stay within the rounding of the type of those in float32."""
    values = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 64, "vocab_size": 96}
    section = ModelSection.model_validate({**values, **MODELS[name]})
    parallel = ParallelContext.create(device=torch.device("cpu"))
    tokens = torch.randint(0, 96, (2, 65), generator=torch.Generator().manual_seed(1))
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
    found = {}
    for kind in (torch.float32, dtype):
        model = build_gpt(section, parallel, seed=3).to(kind)
        model.dtype = kind
        loss, _ = model.loss(batch)
        loss.backward()
        gradient = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
        found[kind] = (float(loss.detach()), gradient)
    assert found[dtype][0] == pytest.approx(found[torch.float32][0], rel=2e-3)
    similarity = torch.nn.functional.cosine_similarity(found[dtype][1], found[torch.float32][1], dim=0)
    assert float(similarity) > 0.995
