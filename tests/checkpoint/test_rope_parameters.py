"""Scaled rotary positions against transformers' Llama, read from it and written for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mlm_cli.checkpoint.hub import load_model_folder, save_model_folder
from mlm_cli.config.schema import ModelSection, RotaryScalingSection
from mlm_cli.errors import CheckpointError
from mlm_cli.models.gpt import GPT
from mlm_cli.models.registry import build_model
from mlm_cli.models.rotary import rotary_frequencies
from mlm_cli.parallel.context import ParallelContext

transformers = pytest.importorskip("transformers")

ONE = ParallelContext.single()
LLAMA: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 96,
    "vocab_size": 101,
    "position": "rotary",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "bias": False,
    "rotary_base": 1000.0,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"type": "linear", "factor": 4.0},
    "ntk": {"type": "ntk", "factor": 4.0},
    "dynamic": {"type": "dynamic", "factor": 2.0},
    "yarn": {"type": "yarn", "factor": 4.0},
    "yarn, own numbers": {"type": "yarn", "factor": 3.0, "attention_factor": 0.9, "beta_fast": 16, "beta_slow": 2},
    "llama3": {"type": "llama3", "factor": 8.0},
    "llama3, own numbers": {"type": "llama3", "factor": 4.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0},
}
THEIRS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
    "yarn, all numbers": {
        "rope_type": "yarn",
        "factor": 3.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
        "attention_factor": 1.3,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 48,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "yarn, mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 24,
        "mscale": 1.0,
        "mscale_all_dim": 0.6,
    },
}


def shake(model: torch.nn.Module) -> None:
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.empty_like(param).normal_(0, 0.15, generator=draw))


def tokens(length: int) -> torch.Tensor:
    return torch.randint(0, 101, (2, length), generator=torch.Generator().manual_seed(8))


@torch.no_grad()
def our_logits(model: GPT, length: int = 90) -> torch.Tensor:
    return model.gather_logits(model.eval()(tokens(length)))


@torch.no_grad()
def logits_of(model: Any, length: int = 90) -> torch.Tensor:
    return model.eval()(tokens(length)).logits


@pytest.mark.parametrize("kind", SCALINGS)
def test_transformers_opens_ours(kind: str, tmp_path: Path) -> None:
    scaling = {**SCALINGS[kind], "original_seq_length": 24}
    model = build_model(ModelSection(**LLAMA, rotary_scaling=scaling), ONE)
    shake(model)
    mine = our_logits(model)
    plain = build_model(ModelSection(**LLAMA), ONE)
    plain.load_state_dict(model.state_dict())
    assert (our_logits(plain) - mine).abs().max() > 0.05, "the scaling changed nothing"

    save_model_folder(model, tmp_path)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits_of(other), mine, rtol=1e-4, atol=1e-4)
    again, section = load_model_folder(tmp_path, ONE)
    assert our_logits(again).equal(mine)
    assert section.seq_length == 96 and section.rotary_base == 1000.0
    assert section.rotary_scaling is not None and section.rotary_scaling.type == scaling["type"]
    save_model_folder(again, tmp_path / "again")
    written = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path, tmp_path / "again")]
    assert {**written[0], "mlm": None} == {**written[1], "mlm": None}


@pytest.mark.parametrize("kind", THEIRS)
def test_we_open_theirs(kind: str, tmp_path: Path) -> None:
    longest = 24 if kind == "dynamic" else 96
    config = transformers.LlamaConfig(
        vocab_size=101, hidden_size=64, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=longest, rope_parameters={**THEIRS[kind], "rope_theta": 500.0},
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config)
    shake(model)
    model.save_pretrained(tmp_path)
    mine, section = load_model_folder(tmp_path, ONE)
    assert section.rotary_base == 500.0
    torch.testing.assert_close(our_logits(mine), logits_of(model), rtol=1e-4, atol=1e-4)


def test_greedy_continuation_is_theirs_beyond_the_trained_length(tmp_path: Path) -> None:
    """`dynamic` turns new tokens by the length so far, and leaves cached keys as they are, here and there."""
    scaling = {**SCALINGS["dynamic"], "original_seq_length": 24}
    model = build_model(ModelSection(**LLAMA, rotary_scaling=scaling), ONE)
    shake(model)
    save_model_folder(model.eval(), tmp_path)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    seen = step = tokens(20)[:1]
    expected = other.generate(seen, max_new_tokens=30, do_sample=False, pad_token_id=0)
    cache = model.new_cache(1, 96)
    with torch.no_grad():
        for _ in range(30):
            step = model.gather_logits(model(step, cache=cache))[:, -1:].argmax(-1)
            seen = torch.cat([seen, step], 1)
    assert seen.tolist() == expected.tolist()


@pytest.mark.parametrize("dim", [2, 8, 64, 128])
@pytest.mark.parametrize("trained", [16, 2048])
def test_yarn_keeps_fast_pairs_and_stretches_slow_ones(dim: int, trained: int) -> None:
    """Peng et al. 2023, section 3.2: pairs of more than 32 turns stay, those of less than one are divided."""
    plain = rotary_frequencies(dim, 10000.0)
    scaling = RotaryScalingSection(type="yarn", factor=8.0, original_seq_length=trained)
    found = rotary_frequencies(dim, 10000.0, scaling)
    turns = trained * plain / (2 * torch.pi)
    torch.testing.assert_close(found[turns < 0.5], plain[turns < 0.5] / 8)
    if dim >= 64:
        torch.testing.assert_close(found[turns > 64], plain[turns > 64])
    assert ((found <= plain * 1.0001) & (found >= plain / 8 * 0.9999)).all()


@pytest.mark.parametrize(
    ("rope", "word"),
    [
        ({"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}, "low_freq_factor"),
        (
            {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4},
            "`high_freq_factor` of the rotary positions is not above `low_freq_factor`",
        ),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 1, "beta_slow": 32}, "is not above"),
        ({"rope_type": "longrope", "rope_theta": 1e4}, "longrope"),
        ({"rope_type": "linear", "rope_theta": 1e4}, "factor"),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": "4"}, "factor"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": False}, "yarn"),
        ({"rope_type": "linear", "factor": 0.5, "rope_theta": 1e4}, "factor"),
        ({"rope_type": "default", "rope_theta": -1}, "rope_theta"),
        ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}, "rotary_base"),  # all pairs would turn alike
        ({"rope_type": "yarn", "factor": 2.0, "partial_rotary_factor": 0.5}, "yarn"),
    ],
    ids=str,
)
def test_what_cannot_be_computed_is_refused(rope: dict[str, Any], word: str, tmp_path: Path) -> None:
    save_model_folder(build_model(ModelSection(**LLAMA), ONE), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    with pytest.raises(CheckpointError, match=word):
        load_model_folder(tmp_path, ONE)


def test_the_older_key_is_taken_where_both_are_there(tmp_path: Path) -> None:
    """By them too: this is how people lengthen the context of a folder that transformers 5 has written."""
    config = transformers.LlamaConfig(
        vocab_size=101, hidden_size=64, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=96, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    shake(model)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written["rope_scaling"] = {"type": "linear", "factor": 3.0}
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    mine, section = load_model_folder(tmp_path, ONE)
    assert section.rotary_scaling is not None and section.rotary_scaling.factor == 3.0
    torch.testing.assert_close(our_logits(mine), logits_of(theirs), rtol=1e-4, atol=1e-4)
    assert (logits_of(theirs) - logits_of(model)).abs().max() > 0.05
