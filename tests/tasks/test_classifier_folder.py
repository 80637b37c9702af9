"""Classifiers against transformers on the same folder, in both directions and at tensor size 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlm_cli.checkpoint.hub import save_model_folder
from mlm_cli.config.schema import ModelSection
from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.errors import CheckpointError
from mlm_cli.models.heads import SequenceClassifier
from mlm_cli.models.registry import build_gpt
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.tasks.classifier_folder import (
    ClassifierFacts,
    load_classifier,
    pad_id_of,
    read_facts,
    save_classifier,
    start_classifier,
)

TOKENIZER = load_tokenizer("bytes")
LABELS = ("bad", "so so", "good")
GPT2 = ModelSection(
    num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=32, vocab_size=TOKENIZER.vocab_size, init_std=0.3
)
LLAMA = GPT2.model_copy(
    update={
        "position": "rotary",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "bias": False,
        "tie_embeddings": False,
        "num_query_groups": 2,
    }
)
FAMILIES = {"gpt2": GPT2, "llama": LLAMA}


def make_batch() -> dict[str, torch.Tensor]:
    """Texts of 1 to 12 tokens, padded on the right as transformers expects it."""
    pad = pad_id_of(TOKENIZER)
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor([12, 1, 7, 3])
    tokens = torch.randint(0, 200, (4, 12), generator=generator)
    return {
        "tokens": tokens.masked_fill(torch.arange(12) >= lengths[:, None], pad),
        "lengths": lengths,
        "labels": torch.tensor([0, 2, 1, 2]),
    }


def save_random(folder: Path, family: str) -> ClassifierFacts:
    parallel = ParallelContext.single()
    gpt = build_gpt(FAMILIES[family], parallel, seed=3)
    classifier = SequenceClassifier(gpt, len(LABELS), seed=11)
    facts = ClassifierFacts(LABELS, pad_id_of(TOKENIZER), 32)
    save_classifier(classifier, folder, TOKENIZER, facts)
    return facts


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_gives_our_logits(tmp_path: Path, family: str) -> None:
    transformers = pytest.importorskip("transformers")
    facts = save_random(tmp_path, family)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == {"gpt2": "GPT2", "llama": "Llama"}[family] + "ForSequenceClassification"
    assert theirs.config.id2label == dict(enumerate(LABELS))
    ours, found = load_classifier(tmp_path, ParallelContext.single())
    assert found == facts
    batch = make_batch()
    with torch.no_grad():
        expected = theirs(batch["tokens"]).logits
        logits = ours(batch["tokens"], batch["lengths"])
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_of_transformers_opens(tmp_path: Path, family: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shared = {"vocab_size": 300, "num_labels": 3, "pad_token_id": 299, "initializer_range": 0.3}
    if family == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, n_positions=32, **shared)
        theirs = transformers.GPT2ForSequenceClassification(config).eval()
    else:
        sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
        config = transformers.LlamaConfig(max_position_embeddings=32, **sizes, **shared)
        theirs = transformers.LlamaForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    ours, facts = load_classifier(tmp_path, ParallelContext.single())
    assert facts.labels == ("LABEL_0", "LABEL_1", "LABEL_2") and facts.pad_id == 299 and facts.max_length == 32
    batch = make_batch()
    tokens = batch["tokens"].masked_fill(torch.arange(12) >= batch["lengths"][:, None], 299)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens, batch["lengths"]), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_padding_changes_nothing() -> None:
    classifier = SequenceClassifier(build_gpt(GPT2, ParallelContext.single(), seed=1), 3, seed=1)
    batch = make_batch()
    with torch.no_grad():
        together = classifier(batch["tokens"], batch["lengths"])
        alone = [classifier(batch["tokens"][i : i + 1, :n], torch.tensor([n])) for i, n in enumerate([12, 1, 7, 3])]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_head_is_a_function_of_the_seed_alone() -> None:
    def weight(model: ModelSection, seed: int) -> torch.Tensor:
        return SequenceClassifier(build_gpt(model, ParallelContext.single(), seed=seed + 50), 3, seed=seed).score.weight

    assert torch.equal(weight(GPT2, 4), weight(GPT2, 4))
    assert torch.equal(weight(GPT2, 4), weight(LLAMA, 4))
    assert not torch.equal(weight(GPT2, 4), weight(GPT2, 5))


def test_starting_from_a_language_model_keeps_its_weights(tmp_path: Path) -> None:
    gpt = build_gpt(LLAMA, ParallelContext.single(), seed=3)
    save_model_folder(gpt, tmp_path, TOKENIZER)
    classifier = start_classifier(tmp_path, ParallelContext.single(), num_labels=2, seed=1)
    names = dict(classifier.named_parameters())
    assert "gpt.head.weight" not in names and names["score.weight"].shape == (2, 32)
    for name, param in gpt.named_parameters():
        if name != "head.weight":
            assert torch.equal(names[f"gpt.{name}"], param)


def test_a_language_model_is_not_a_classifier(tmp_path: Path) -> None:
    save_model_folder(build_gpt(GPT2, ParallelContext.single(), seed=3), tmp_path, TOKENIZER)
    with pytest.raises(CheckpointError, match="holds a GPT2LMHeadModel, not a classifier"):
        read_facts(tmp_path)


def loss_and_gradients(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """On each rank: loss, logits, whole gradients of the head and of a sliced layer; then saves what it loaded."""
    from mlm_cli.parallel.shard import gather_full, shard_of

    parallel = ParallelContext.create(tensor=world_size)
    classifier, facts = load_classifier(Path(folder), parallel)
    batch = make_batch()
    loss, right = classifier.loss(batch)
    loss.backward()
    params = dict(classifier.named_parameters())
    chosen = ("score.weight", "gpt.layers.0.attention.qkv.weight", "gpt.layers.1.mlp.down.weight")
    gradients = {name: gather_full(params[name].grad, shard_of(params[name]), parallel.tensor) for name in chosen}
    save_classifier(classifier, Path(folder) / f"again{world_size}", TOKENIZER, facts)
    values = {"loss": loss, "right": right, "logits": classifier(batch["tokens"], batch["lengths"]), **gradients}
    return {name: value.detach().numpy() for name, value in values.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_slices_change_nothing(tmp_path: Path, family: str, run_ranks: Any) -> None:
    save_random(tmp_path, family)
    (whole,) = run_ranks(loss_and_gradients, 1, str(tmp_path))
    for sliced in run_ranks(loss_and_gradients, 2, str(tmp_path)):
        for name, value in whole.items():
            np.testing.assert_allclose(sliced[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    files = [(tmp_path / f"again{size}" / "model.safetensors").read_bytes() for size in (1, 2)]
    assert files[0] == files[1] == (tmp_path / "model.safetensors").read_bytes()
