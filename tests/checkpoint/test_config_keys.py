"""Every key of a `config.json` of transformers is understood, changes nothing, or is refused: never a silent mistake.

The keys are those their own configuration class writes; the oracle is their own model, opened from the same folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mlm_cli.checkpoint.hub import load_model_folder
from mlm_cli.errors import CheckpointError
from mlm_cli.parallel.context import ParallelContext
from tests.checkpoint.their_sizes import THEIR_SIZES

transformers = pytest.importorskip("transformers")

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "vocab_size": 101}
T5 = {"vocab_size": 101, "d_model": 32, "d_kv": 8, "d_ff": 44, "num_layers": 2, "num_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {**GPT2, "bos_token_id": 0, "eos_token_id": 0},
    "LlamaForCausalLM": {**THEIR_SIZES, "bos_token_id": 0, "eos_token_id": 0},
    "BertForMaskedLM": THEIR_SIZES,
    "MegatronBertForMaskedLM": THEIR_SIZES,
    "T5ForConditionalGeneration": {**T5, "decoder_start_token_id": 0},
}
ACTIVATIONS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")
VALUES: dict[str, tuple[str, ...]] = {
    "activation_function": ACTIVATIONS,
    "hidden_act": ACTIVATIONS,
    "feed_forward_proj": (*ACTIVATIONS, *(f"gated-{name}" for name in ACTIVATIONS)),
    "dense_act_fn": ACTIVATIONS,
}
BESIDE: dict[str, dict[str, Any]] = {  # what old versions wrote, or other models have
    "GPT2LMHeadModel": {"n_inner": 48},
    "LlamaForCausalLM": {
        "partial_rotary_factor": 0.5,
        "sliding_window": 4,
        "rope_theta": 500.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "head_dim": 12,
    },
    "BertForMaskedLM": {"position_embedding_type": "relative_key"},
    "MegatronBertForMaskedLM": {"position_embedding_type": "relative_key_query"},
    "T5ForConditionalGeneration": {"num_decoder_layers": 3},
}
SCALE = {"initializer_factor"}  # of the random weights alone


def other_values(key: str, value: Any) -> list[Any]:
    if key in SCALE:
        return []
    if key in VALUES:
        return list(VALUES[key])
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value * 2, value + 1] if value else [1, 2]
    return [value * 3 or 0.5] if isinstance(value, float) else []


def make(cls: Any, settings: dict[str, Any], folder: Path) -> Any:
    """Their model as their own loader reads it back; None where they refuse these settings themselves."""
    try:
        torch.manual_seed(1)
        model = cls(cls.config_class(**settings)).eval()
        draw = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for param in model.parameters():
                param.add_(torch.empty_like(param).normal_(0, 0.15, generator=draw))
        model.save_pretrained(folder)
        model = cls.from_pretrained(folder, dtype=torch.float32).eval()
        their_logits(model)
    except Exception:
        return None
    return model


def tokens() -> Tensor:
    return torch.randint(1, 90, (2, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def their_logits(model: Any) -> Tensor:
    extra = {"decoder_input_ids": tokens().flip(1)} if model.config.is_encoder_decoder else {}
    logits: Tensor = model(input_ids=tokens(), **extra).logits
    return logits


@torch.no_grad()
def our_logits(model: Any) -> Tensor:
    if model.config.family == "t5":
        return model.gather_logits(model(tokens(), tokens().flip(1)))
    return model.gather_logits(model.logits(model.hidden(tokens())))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_no_key_is_misread(name: str, tmp_path: Path) -> None:
    transformers.logging.set_verbosity_error()
    cls = getattr(transformers, name)
    written = cls.config_class(**MODELS[name]).to_dict()
    cases = [(key, value) for key, old in written.items() for value in other_values(key, old)]
    equal, refused, wrong = 0, 0, []
    for number, (key, value) in enumerate([*cases, *BESIDE[name].items()]):
        folder = tmp_path / str(number)
        theirs = make(cls, {**MODELS[name], key: value}, folder)
        if theirs is None:
            continue
        try:
            ours, _ = load_model_folder(folder, ParallelContext.single())
        except CheckpointError:
            refused += 1
            continue
        found, wanted = our_logits(ours.eval()), their_logits(theirs)
        equal += 1
        if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=1e-4, atol=1e-4):
            wrong.append(f"{key}={value}")
    assert not wrong
    assert equal > 20 and refused > 2
