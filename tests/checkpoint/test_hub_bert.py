"""BERT crosses to transformers and back: logits of words and binary head, and the pretraining loss itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models.bert_models import SECTIONS, make_batch, shake
from safetensors.torch import load_file, save_file

from mlm_cli.checkpoint.hub import load_model_folder, read_model_config, save_model_folder
from mlm_cli.errors import CheckpointError
from mlm_cli.models.bert import Bert
from mlm_cli.models.registry import build_model
from mlm_cli.parallel.context import ParallelContext
from tests.checkpoint.their_sizes import THEIR_SIZES

transformers = pytest.importorskip("transformers")

ONE = ParallelContext.single()
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForPreTraining", {}),
    "bert words": ("BertForMaskedLM", {"hidden_act": "gelu_new", "type_vocab_size": 3}),
    "megatron": ("MegatronBertForPreTraining", {}),
    "megatron words": ("MegatronBertForMaskedLM", {"layer_norm_eps": 1e-5}),
}


def their_class(folder: Path) -> Any:
    """The class that a folder's config.json names."""
    return getattr(transformers, transformers.AutoConfig.from_pretrained(folder).architectures[0])


def open_theirs(folder: Path) -> Any:
    model, info = their_class(folder).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    # An untied model keeps a second bias there that nothing uses.
    unused = set() if model.config.tie_word_embeddings else {"cls.predictions.bias"}
    assert set(info["missing_keys"]) <= unused and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def their_output(model: Any, batch: dict[str, torch.Tensor]) -> tuple[Any, torch.Tensor]:
    """Their forward pass with labels where words are masked; loss included."""
    labels = torch.full_like(batch["tokens"], -100)
    for row, (places, words, real) in enumerate(
        zip(batch["masked_positions"], batch["labels"], batch["loss_mask"], strict=True)
    ):
        labels[row, places[real > 0]] = words[real > 0]
    mask = (torch.arange(batch["tokens"].shape[1]) < batch["lengths"][:, None]).long()
    extra = {}
    if "binary_labels" in batch:
        extra["next_sentence_label"] = batch["binary_labels"]
    with torch.no_grad():
        out = model(batch["tokens"], attention_mask=mask, token_type_ids=batch["token_types"], labels=labels, **extra)
    return out, out.prediction_logits if "binary_labels" in batch else out.logits


def check_equal(model: Bert, theirs: Any) -> None:
    """Words' logits at every real place, binary logits and loss."""
    batch = make_batch(model.config, 5)
    out, logits = their_output(theirs, batch)
    real = torch.arange(24) < batch["lengths"][:, None]
    with torch.no_grad():
        hidden = model.hidden(batch["tokens"], lengths=batch["lengths"], token_types=batch["token_types"])
        ours = model.gather_logits(model.logits(hidden))
        torch.testing.assert_close(ours[real], logits[real], rtol=1e-4, atol=1e-4)
        if "binary_labels" in batch:
            binary = model.head.binary_logits(hidden)
            torch.testing.assert_close(binary, out.seq_relationship_logits, rtol=1e-4, atol=1e-4)
        loss, count = model.loss(batch)
        assert loss.item() == pytest.approx(out.loss.item(), rel=1e-5)
        assert count.item() == 9


@pytest.mark.parametrize("kind", SECTIONS)
def test_transformers_opens_ours(kind: str, tmp_path: Path) -> None:
    model = build_model(SECTIONS[kind], ONE).eval()
    shake(model)
    with torch.no_grad():  # whatever is in the padding must not matter
        for name in ("embedding.word.weight", "head.weight", "head.bias"):
            for param in (p for n, p in model.named_parameters() if n == name):
                param[model.vocab_size :] = 1e4
    save_model_folder(model, tmp_path)
    assert isinstance(model, Bert)
    check_equal(model, open_theirs(tmp_path))
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert tensor.abs().max() < 100, f"padding leaked into {name}"
    again, section = load_model_folder(tmp_path, ONE)
    batch = make_batch(model.config, 1)
    assert again.eval().scores(batch).equal(model.scores(batch))
    default = {"ffn_hidden_size", "head_dim", "num_query_groups"}  # written out in full
    assert section.model_dump(exclude=default) == model.config.model_dump(exclude=default)


@pytest.mark.parametrize("kind", THEIRS)
def test_we_open_theirs(kind: str, tmp_path: Path) -> None:
    name, settings = THEIRS[kind]
    cls = getattr(transformers, name)
    theirs = cls(cls.config_class(**{**THEIR_SIZES, **settings})).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, section = load_model_folder(tmp_path / "theirs", ONE)
    assert isinstance(ours, Bert)
    expected = "none" if "words" in kind else "next_sentence" if kind == "bert" else "sentence_order"
    assert section.binary_head == expected
    check_equal(ours.eval(), theirs)
    # and out again: what they open is what they wrote
    save_model_folder(ours, tmp_path / "ours")
    assert their_class(tmp_path / "ours") is cls
    written = open_theirs(tmp_path / "ours").state_dict()
    for key, tensor in theirs.state_dict().items():
        assert written[key].equal(tensor), key
    assert read_model_config(tmp_path / "ours")[0] == section


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining"])
@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_models_of_the_original(name: str, prefix: str, tmp_path: Path) -> None:
    """google-bert/bert-base-uncased: norms are `gamma` and `beta`, and both heads there, whatever class is named."""
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**THEIR_SIZES)).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {}
    for key, tensor in load_file(path).items():
        for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
            key = key.replace(new, old)
        tensors[prefix + key.removeprefix("bert.") if key.startswith("bert.") else key] = tensor
    assert sum("gamma" in key for key in tensors) == 6
    save_file(tensors, path, {"format": "pt"})
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("BertForPreTraining", name))

    ours, section = load_model_folder(tmp_path, ONE)
    assert isinstance(ours, Bert) and section.binary_head == ("none" if "Masked" in name else "next_sentence")
    same = theirs if "PreTraining" in name else transformers.BertForMaskedLM(theirs.config)
    same.load_state_dict(theirs.state_dict(), strict=False)
    check_equal(ours.eval(), same.eval())
    load_model_folder(tmp_path, ONE, head=False)


def test_copies_that_differ_are_refused(tmp_path: Path) -> None:
    theirs = transformers.BertForMaskedLM(transformers.BertConfig(**THEIR_SIZES))
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    words = "bert.embeddings.word_embeddings.weight"
    copies = {"cls.predictions.decoder.weight": words, "cls.predictions.decoder.bias": "cls.predictions.bias"}
    save_file(tensors | {copy: tensors[first].clone() for copy, first in copies.items()}, path)
    load_model_folder(tmp_path, ONE)
    for copy, first in copies.items():
        save_file(tensors | {copy: tensors[first] + 1}, path)
        with pytest.raises(CheckpointError, match=f"{copy} is not {first}"):
            load_model_folder(tmp_path, ONE)
