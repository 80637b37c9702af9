"""T5 crosses to transformers and back: logits, loss and every gradient, those of the tables of positions too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models.t5_models import SECTIONS, make_batch, shake
from safetensors.torch import load_file, save_file

from mlm_cli.checkpoint import map_t5
from mlm_cli.checkpoint.hub import load_model_folder, read_model_config, save_model_folder
from mlm_cli.config.schema import AttentionSection
from mlm_cli.errors import CheckpointError
from mlm_cli.models.registry import build_model
from mlm_cli.models.t5 import T5
from mlm_cli.parallel.context import ParallelContext

transformers = pytest.importorskip("transformers")

ONE = ParallelContext.single()
BASE: dict[str, Any] = {
    "vocab_size": 101,
    "d_model": 32,
    "d_kv": 10,
    "d_ff": 44,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
}
# Without an output layer of its own a v1.1 folder holds the words alone, and they stand in for it.
THEIRS: dict[str, dict[str, Any]] = {
    "v1.0": {},
    "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 3},
    "v1.1 with words for output": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "silu": {"feed_forward_proj": "gated-silu", "relative_attention_num_buckets": 12},
}


def open_theirs(folder: Path) -> Any:
    model, info = transformers.T5ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def their_output(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    """Their forward pass, loss included."""
    lengths = batch.get("lengths", torch.full((3,), 24))
    return model(
        batch["tokens"],
        attention_mask=(torch.arange(24) < lengths[:, None]).long(),
        decoder_input_ids=batch["decoder_tokens"],
        labels=batch["labels"].masked_fill(batch["loss_mask"] == 0, -100),
    )


def check_equal(model: T5, theirs: Any) -> None:
    """Logits, loss and, from ours and theirs of every name, gradients."""
    for full in (False, True):
        batch = make_batch(model.config, 5, full=full)
        model.zero_grad(), theirs.zero_grad()
        out = their_output(theirs, batch)
        with torch.no_grad():
            ours = model.gather_logits(model(batch["tokens"], batch["decoder_tokens"], lengths=batch.get("lengths")))
        torch.testing.assert_close(ours, out.logits, rtol=1e-4, atol=1e-4)
        loss, count = model.loss(batch)
        assert loss.item() == pytest.approx(out.loss.item(), rel=1e-5) and count == batch["loss_mask"].sum()
        loss.backward(), out.loss.backward()
        expected = {name: param.grad for name, param in theirs.named_parameters()}
        expected.setdefault("lm_head.weight", expected["shared.weight"])
        for name, param in model.named_parameters():
            parts = [expected[source] for source in map_t5.key_map(model.config).entries[name].sources]
            grad = param.grad[: model.vocab_size] if name in ("embedding.word.weight", "head.weight") else param.grad
            largest = max(part.abs().max().item() for part in parts)
            torch.testing.assert_close(grad, torch.cat(parts), rtol=0, atol=5e-5 * largest, msg=name)


@pytest.mark.parametrize("attention", ["auto", "sdpa", "fused", "reference"])
@pytest.mark.parametrize("kind", SECTIONS)
def test_transformers_opens_ours(kind: str, attention: str, tmp_path: Path) -> None:
    model = build_model(SECTIONS[kind].model_copy(update={"attention": AttentionSection(kernel=attention)}), ONE).eval()
    assert isinstance(model, T5)
    shake(model)
    with torch.no_grad():  # whatever is in the padding must not matter
        for name in ("embedding.word.weight", "head.weight"):
            for param in (p for n, p in model.named_parameters() if n == name):
                param[model.vocab_size :] = 1e4
    save_model_folder(model, tmp_path)
    check_equal(model, open_theirs(tmp_path))
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert tensor.abs().max() < 100, f"padding leaked into {name}"
    again, section = load_model_folder(tmp_path, ONE)
    batch = make_batch(model.config, 1)
    assert again.eval().scores(batch).equal(model.scores(batch))
    default = {"num_query_groups", "num_decoder_layers"}  # written out in full
    assert section.model_dump(exclude=default) == model.config.model_dump(exclude=default)


@pytest.mark.parametrize("kind", THEIRS)
def test_we_open_theirs(kind: str, tmp_path: Path) -> None:
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**{**BASE, **THEIRS[kind]})).eval()
    if kind == "v1.1":  # transformers 5 begins with tied words, and keeps them apart only where a folder does
        theirs.lm_head.weight = torch.nn.Parameter(torch.empty(101, 32).normal_(0, 0.2))
        theirs.config.tie_word_embeddings = False
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, section = load_model_folder(tmp_path / "theirs", ONE)
    assert isinstance(ours, T5)
    tied = kind in ("v1.0", "silu")
    assert section.tie_embeddings is tied
    if kind == "v1.1 with words for output":
        assert ours.eval().head.weight is not None
        with torch.no_grad():
            batch = make_batch(section, 5)
            logits = ours.gather_logits(ours(batch["tokens"], batch["decoder_tokens"], lengths=batch["lengths"]))
            torch.testing.assert_close(logits, their_output(theirs, batch).logits, rtol=1e-4, atol=1e-4)
        return
    check_equal(ours.eval(), theirs)
    # and out again: what they open is what they wrote
    save_model_folder(ours, tmp_path / "ours")
    written = open_theirs(tmp_path / "ours").state_dict()
    for key, tensor in theirs.state_dict().items():
        assert written[key].equal(tensor), key
    assert read_model_config(tmp_path / "ours")[0] == section


def test_an_output_layer_that_config_json_denies_is_refused(tmp_path: Path) -> None:
    model = build_model(SECTIONS["v1.0"], ONE)
    save_model_folder(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["shared.weight"].clone()}, tmp_path / "model.safetensors")
    load_model_folder(tmp_path, ONE)
    save_file({**tensors, "lm_head.weight": tensors["shared.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not shared\.weight"):
        load_model_folder(tmp_path, ONE)


def test_gates_that_config_json_denies_are_refused(tmp_path: Path) -> None:
    save_model_folder(build_model(SECTIONS["v1.0"], ONE), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "is_gated_act": False}))
    load_model_folder(tmp_path, ONE)
    path.write_text(json.dumps({**config, "is_gated_act": True}))
    with pytest.raises(CheckpointError, match="is_gated_act"):
        load_model_folder(tmp_path, ONE)
