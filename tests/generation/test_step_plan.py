"""The fused decoding step against the model's own layers: every setting of the layer, odd sizes, each dtype."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from mlm_cli import ops
from mlm_cli.config.schema import ModelSection
from mlm_cli.generation.decoder import Decoder
from mlm_cli.generation.slots import Slots
from mlm_cli.generation.step_plan import StepPlan, _scales, _weights
from mlm_cli.models.gpt import GPT
from mlm_cli.models.registry import build_gpt
from mlm_cli.parallel.context import ParallelContext

SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2-erf-untied": {"activation": "gelu_erf", "tie_embeddings": False},
    "llama": {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "num_query_groups": 2},
    "wide": {"ffn_hidden_size": 203},  # whole cache lines of a type, whole vectors and a rest
    "odd": {"head_dim": 10, "ffn_hidden_size": 37, "vocab_size": 131, "position": "rotary", "activation": "swiglu"},
}

pytestmark = pytest.mark.skipif(
    not ops.serves_decode_step(torch.float32, torch.device("cpu")), reason="kernels are not built"
)


def make(name: str, dtype: torch.dtype) -> GPT:
    base = {"num_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "seq_length": 64, "vocab_size": 300}
    section = ModelSection(**{**base, **SETTINGS[name]})
    model = build_gpt(section, ParallelContext.single(), dtype=dtype, seed=3).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(1)
    for param in model.parameters():  # biases and norms away from 0 and 1, so that a forgotten one shows
        param.add_((torch.randn(param.shape, generator=draw) * 0.1).to(dtype))
    return model


def grow(decoder: Decoder, rows: int, steps: int) -> torch.Tensor:
    """Logits of some steps over rows of different length."""
    vocabulary = decoder.model.vocab_size
    for row in range(rows):
        decoder.add([(7 * row + i) % vocabulary for i in range(1 + 3 * row % 50)])
    return torch.stack([decoder.step([(5 * row + 11 * n) % vocabulary for row in range(rows)]) for n in range(steps)])


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 33, 64])
@pytest.mark.parametrize("name", SETTINGS)
def test_float32_logits_are_those_of_the_layers(name: str, rows: int) -> None:
    model = make(name, torch.float32)
    assert StepPlan.of(model, 64) is not None
    fused, plain = grow(Decoder(model, rows), rows, 5), grow(Decoder(model, rows, fused=False), rows, 5)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", SETTINGS)
def test_half_precision_is_no_further_from_the_truth_than_the_layers(name: str, dtype: torch.dtype) -> None:
    """The truth: the same rounded weights in float32."""
    model = make(name, dtype)
    exact = make(name, torch.float32)
    exact.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    truth = grow(Decoder(exact, 3, fused=False), 3, 5)
    fused = (grow(Decoder(model, 3), 3, 5).float() - truth).abs()
    plain = (grow(Decoder(model, 3, fused=False), 3, 5).float() - truth).abs()
    assert fused.mean() <= plain.mean()
    assert fused.max() < 0.05 * truth.abs().max()


def test_the_step_is_used_and_rows_beyond_its_reach_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = StepPlan.logits

    def counted(plan: StepPlan, tokens: torch.Tensor, slots: Slots) -> torch.Tensor:
        calls.append(len(tokens))
        return real(plan, tokens, slots)

    monkeypatch.setattr(StepPlan, "logits", counted)
    grow(Decoder(make("gpt2", torch.float32), 80), 3, 2)
    grow(Decoder(make("gpt2", torch.float32), 80), 64, 1)
    grow(Decoder(make("gpt2", torch.float32), 80), 65, 1)
    assert calls == [3, 3, 64]
    for amx, most in ((True, 16), (False, 32)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx, raising=False)
        plan = StepPlan.of(make("gpt2", torch.bfloat16), 64)
        assert plan is not None and plan.most_rows == most


def test_a_model_with_anything_unknown_keeps_its_own_layers() -> None:
    """An adapter, a hook, another kind of layer: none may be left out silently."""
    model = make("gpt2", torch.float32)
    model.layers[0].mlp.adapter = torch.nn.Linear(4, 4)
    assert StepPlan.of(model, 64) is None
    model = make("gpt2", torch.float32)
    model.layers[1].attention.out.scale = torch.nn.Parameter(torch.ones(1))
    assert StepPlan.of(model, 64) is None
    model = make("gpt2", torch.float32)
    model.layers[1].register_forward_hook(lambda *_: None)
    assert StepPlan.of(model, 64) is None


def test_tensors_that_do_not_fit_are_refused_in_words() -> None:
    sizes: dict[str, Any] = {"heads": 4, "groups": 4, "dim": 12, "vocab_size": 300}
    sizes |= {"activation": "gelu", "rms": False, "eps": 1e-5}
    model = make("gpt2", torch.float32)
    weights, scales, cache = _weights(model), _scales(model), Slots(model, 2, 64).tensors
    ops.DecodeStep(weights, scales, cache, None, **sizes)
    for place, wrong, words in (
        (0, weights[0].to(torch.bfloat16), "must be"),
        (5, torch.empty(0), "a norm without a weight"),
        (7, weights[7].t().contiguous().t(), "`qkv` must be packed"),
        (8, torch.ones(3), "`qkv bias` must have 144 elements"),
    ):
        with pytest.raises(RuntimeError, match=words):
            ops.DecodeStep([*weights[:place], wrong, *weights[place + 1 :]], scales, cache, None, **sizes)
    with pytest.raises(RuntimeError, match="28 weights and 4 caches"):
        ops.DecodeStep(weights[:-1], scales, cache, None, **sizes)
    with pytest.raises(RuntimeError, match="a cache must be packed"):
        ops.DecodeStep(weights, scales, [*cache[:3], cache[3][:1]], None, **sizes)
    with pytest.raises(RuntimeError, match="must be packed float32"):
        ops.DecodeStep(weights, scales, cache, (torch.ones(64, 12), torch.ones(64, 12)), **sizes)
    with pytest.raises(RuntimeError, match="not a plan"):
        torch.ops.mlm.decode_step(torch.zeros(500, dtype=torch.int64), torch.tensor([1]), torch.tensor([0]))


def test_bad_input_is_refused_in_words() -> None:
    model = make("gpt2", torch.float32)
    decoder = Decoder(model)
    decoder.add([1, 2])
    with pytest.raises(RuntimeError, match="token 100000 is not in the vocabulary"):
        decoder.step([100_000])
    plan = StepPlan.of(model, 64)
    assert plan is not None
    slots = decoder._slots
    slots.positions = torch.tensor([64])
    with pytest.raises(RuntimeError, match="position 64"):
        plan.logits(torch.tensor([1]), slots)


_OTHER_ISA = """
import torch
from tests.generation.test_step_plan import Decoder, grow, make
from tests.generation.test_step_plan_int8 import exact, quantized
for name in ("odd", "wide"):
    model = make(name, torch.float32)
    fused, plain = grow(Decoder(model, 3), 3, 2), grow(Decoder(model, 3, fused=False), 3, 2)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=2e-5)
    int8 = quantized(name)
    truth = grow(Decoder(exact(int8, name), 3, fused=False), 3, 2)
    torch.testing.assert_close(grow(Decoder(int8, 3), 3, 2).double(), truth, rtol=1e-5, atol=2e-5)
print(torch.ops.mlm.cpu_level())
"""


@pytest.mark.parametrize(("isa", "level"), [("avx2", 1), ("plain", 0)])
def test_lower_instruction_sets_agree(isa: str, level: int) -> None:
    env = {**os.environ, "MLM_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", _OTHER_ISA], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= level  # a processor may have less than was asked for
