"""The fused decoding step over int8 matrices against what they stand for, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mlm_cli import ops
from mlm_cli.generation.decoder import Decoder
from mlm_cli.generation.slots import Slots
from mlm_cli.generation.step_plan import StepPlan, _scales, _weights
from mlm_cli.models.gpt import GPT
from mlm_cli.parallel.layers import ParallelLinear
from tests.generation.test_step_plan import SETTINGS, grow, make

pytestmark = pytest.mark.skipif(
    not ops.serves_decode_step(torch.float32, torch.device("cpu")), reason="kernels are not built"
)


def matrices(model: GPT) -> list[ParallelLinear]:
    return [module for module in model.modules() if isinstance(module, ParallelLinear)]


def quantized(name: str, dtype: torch.dtype = torch.float32, scale_dtype: torch.dtype = torch.float32) -> GPT:
    model = make(name, dtype)
    for module in matrices(model):
        codes, scales = ops.quantize_rows(module.weight.float(), scale_dtype)
        module.hold_int8(scale_dtype)
        module.weight.copy_(codes)
        module.weight_scale.copy_(scales)
    return model


def exact(model: GPT, name: str) -> GPT:
    """The same model in float64."""
    truth = make(name, torch.float64)
    for ours, theirs in zip(model.modules(), truth.modules(), strict=True):
        for key, param in ours.named_parameters(recurse=False):
            is_matrix = isinstance(ours, ParallelLinear) and key == "weight"
            value = ours.weight.double() * ours.weight_scale.double()[:, None] if is_matrix else param.double()
            theirs.get_parameter(key).copy_(value)
    return truth


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 33, 64, 65])
@pytest.mark.parametrize("name", SETTINGS)
def test_logits_are_those_of_the_matrices_in_float64(name: str, rows: int) -> None:
    """65 rows are more than the step serves: there the layers make the matrices anew at each token."""
    model = quantized(name)
    truth = grow(Decoder(exact(model, name), rows, fused=False), rows, 3)
    fused = grow(Decoder(model, rows), rows, 3)
    assert all(module.weight.dtype == torch.int8 for module in matrices(model))
    torch.testing.assert_close(fused.double(), truth, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["gpt2", "odd"])
def test_beside_half_precision(name: str, dtype: torch.dtype) -> None:
    """Embeddings, biases and cache of 16 bits, scales too; activations are float32 all the same."""
    model = quantized(name, dtype, scale_dtype=dtype)
    truth = grow(Decoder(exact(model, name), 3, fused=False), 3, 4)
    fused = grow(Decoder(model, 3), 3, 4)
    plan = StepPlan.of(model, 64)
    assert plan is not None and plan.most_rows == 64
    assert (fused.double() - truth).abs().max() < 0.02 * truth.abs().max()


def test_codes_at_both_ends() -> None:
    model = quantized("gpt2")
    block = model.layers[0]
    block.mlp.up.weight.fill_(127)
    block.mlp.down.weight.fill_(-127)
    block.attention.qkv.weight[::2].fill_(-128)  # which we do not write, and others may
    truth = grow(Decoder(exact(model, "gpt2"), 2, fused=False), 2, 2)
    torch.testing.assert_close(grow(Decoder(model, 2), 2, 2).double(), truth, rtol=1e-5, atol=1e-4)


def test_where_layers_run_one_by_one_matrices_become_floating_point() -> None:
    kept, plain = quantized("llama"), quantized("llama")
    assert StepPlan.of(kept, 64) is not None
    fused = grow(Decoder(kept, 3), 3, 3)
    layers = grow(Decoder(plain, 3, keep_states=True), 3, 3)
    assert all(module.weight.dtype == torch.float32 and module.weight_scale is None for module in matrices(plain))
    torch.testing.assert_close(fused, layers, rtol=1e-5, atol=2e-5)


def test_scales_that_do_not_fit_are_refused_in_words() -> None:
    sizes: dict[str, Any] = {"heads": 4, "groups": 4, "dim": 12, "vocab_size": 300}
    sizes |= {"activation": "gelu", "rms": False, "eps": 1e-5}
    model = quantized("gpt2")
    weights, scales, cache = _weights(model), _scales(model), Slots(model, 2, 64).tensors
    ops.DecodeStep(weights, scales, cache, None, **sizes)
    nothing = torch.empty(0)
    for wrong, words in (
        ([nothing, *scales[1:]], "`qkv` must be packed"),
        ([scales[0][:5], *scales[1:]], "scales of `qkv` must be 144"),
        ([scales[0].double(), *scales[1:]], "packed float32"),
        (scales[:-1], "7 scales for 2 layers"),
    ):
        with pytest.raises(RuntimeError, match=words):
            ops.DecodeStep(weights, wrong, cache, None, **sizes)
    plain = _weights(make("gpt2", torch.float32))
    with pytest.raises(RuntimeError, match="`qkv` with scales must be packed"):
        ops.DecodeStep(plain, scales, cache, None, **sizes)
