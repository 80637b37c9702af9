"""Perplexity against transformers' own loss on the same folder, and its independence of batch, tensor and data size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlm_cli.checkpoint.hub import load_model_folder, save_model_folder
from mlm_cli.config.schema import ModelSection
from mlm_cli.data.tokenizer import Tokenizer, load_tokenizer
from mlm_cli.errors import DataError, UsageError
from mlm_cli.evaluation.documents import Document, open_documents
from mlm_cli.evaluation.perplexity import Tally, perplexity_metrics, relative_error_of_total, score_documents
from mlm_cli.models.registry import build_gpt
from mlm_cli.parallel.context import ParallelContext

LENGTH = 64


def save_random(folder: Path, tokenizer: Tokenizer) -> None:
    section = ModelSection(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        seq_length=LENGTH,
        vocab_size=tokenizer.vocab_size,
        init_std=0.2,
        make_vocab_size_divisible_by=64,
    )
    save_model_folder(build_gpt(section, ParallelContext.single(), seed=7), folder, tokenizer)


@pytest.fixture(scope="module")
def gpt2_tokenizer(test_data: Path) -> Tokenizer:
    return load_tokenizer(test_data / "tokenizers" / "gpt2")


@pytest.fixture(scope="module")
def wikitext(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The beginning of the WikiText-2 validation text, as one document."""
    path = tmp_path_factory.mktemp("wiki") / "wiki.txt"
    text = (test_data / "corpora" / "wikitext-2" / "wiki.valid.raw").read_text(encoding="utf-8")
    path.write_text(text[:6000], encoding="utf-8")
    return path


def published_recipe(model: Any, ids: torch.Tensor, max_length: int, stride: int) -> tuple[float, int]:
    """Hugging Face's "Perplexity of fixed-length models": windows, labels masked with -100, the model's own loss."""
    total, count, previous = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + max_length, ids.shape[1])
        inputs = ids[:, begin:end]
        targets = inputs.clone()
        targets[:, : -(end - previous)] = -100
        scored = int((targets[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(inputs, labels=targets).loss) * scored
        count += scored
        previous = end
        if end == ids.shape[1]:
            break
    return total, count


@pytest.mark.parametrize("stride", [16, 63])
@pytest.mark.parametrize("with_prefix", [True, False])
def test_equals_transformers_on_wikitext(
    tmp_path: Path, wikitext: Path, gpt2_tokenizer: Tokenizer, stride: int, with_prefix: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    save_random(tmp_path, gpt2_tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours, _ = load_model_folder(tmp_path, ParallelContext.single())
    documents = open_documents([str(wikitext)], gpt2_tokenizer)
    prefix = gpt2_tokenizer.eod_id if with_prefix else None
    tally = score_documents(ours, documents, length=LENGTH - 1, stride=stride, prefix=prefix, batch_size=4)

    text = wikitext.read_text(encoding="utf-8")
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    ids = torch.tensor([[prefix, *ids] if prefix is not None else ids])
    total, count = published_recipe(theirs, ids, LENGTH, stride)
    assert int(tally.tokens.sum()) == count == ids.shape[1] - 1
    assert tally.nll.sum() == pytest.approx(total, rel=1e-5)

    metrics, _ = perplexity_metrics(tally, documents)
    assert metrics["token_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert metrics["word_perplexity"] == pytest.approx(math.exp(total / len(text.split())), rel=1e-3)
    assert metrics["bits_per_byte"] == pytest.approx(total / len(text.encode()) / math.log(2), rel=1e-5)
    assert metrics["byte_perplexity"] == pytest.approx(2 ** metrics["bits_per_byte"])


def mixed_documents() -> list[Document]:
    rng = np.random.default_rng(2)
    return [Document(rng.integers(0, 200, n), n // 4 + 1, n) for n in (300, 5, 0, 64, 1, 129, 17, 65)]


def test_number_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    save_random(tmp_path, load_tokenizer("bytes"))
    model, _ = load_model_folder(tmp_path, ParallelContext.single())
    documents = mixed_documents()
    tallies = [
        score_documents(model, documents, length=LENGTH, stride=40, prefix=0, batch_size=size) for size in (1, 3, 16)
    ]
    assert int(tallies[0].tokens.sum()) == sum(len(document.ids) for document in documents)
    for tally in tallies[1:]:
        assert tally.nll.sum() == pytest.approx(tallies[0].nll.sum(), rel=1e-6)
        np.testing.assert_allclose(tally.nll, tallies[0].nll, rtol=1e-5)


def test_documents_are_scored_alone(tmp_path: Path) -> None:
    save_random(tmp_path, load_tokenizer("bytes"))
    model, _ = load_model_folder(tmp_path, ParallelContext.single())
    documents = [document for document in mixed_documents() if len(document.ids)]
    together = score_documents(model, documents, length=LENGTH, prefix=0)
    alone = [score_documents(model, [document], length=LENGTH, prefix=0).nll.sum() for document in documents]
    np.testing.assert_allclose(np.bincount(together.document, together.nll), alone, rtol=1e-6)


def score_on_ranks(rank: int, world_size: int, folder: str, tensor: int) -> list[float]:
    model, _ = load_model_folder(Path(folder), ParallelContext.create(tensor=tensor))
    return score_documents(model, mixed_documents(), length=LENGTH, stride=40, prefix=0, batch_size=2).nll.tolist()


@pytest.mark.parametrize(
    ("world_size", "tensor"),
    [(4, 2), pytest.param(2, 2, marks=pytest.mark.slow), pytest.param(2, 1, marks=pytest.mark.slow)],
)
def test_number_does_not_depend_on_the_layout(tmp_path: Path, run_ranks: Any, world_size: int, tensor: int) -> None:
    save_random(tmp_path, load_tokenizer("bytes"))
    model, _ = load_model_folder(tmp_path, ParallelContext.single())
    alone = score_documents(model, mixed_documents(), length=LENGTH, stride=40, prefix=0, batch_size=2).nll
    for found in run_ranks(score_on_ranks, world_size, str(tmp_path), tensor):
        np.testing.assert_allclose(found, alone, rtol=1e-5)
        assert sum(found) == pytest.approx(alone.sum(), rel=1e-6)


def test_refusals(tmp_path: Path) -> None:
    save_random(tmp_path, load_tokenizer("bytes"))
    model, _ = load_model_folder(tmp_path, ParallelContext.single())
    with pytest.raises(UsageError, match="stride 65"):
        score_documents(model, mixed_documents(), length=LENGTH, stride=65)
    with pytest.raises(DataError, match="token id 9999 is not in the model's vocabulary"):
        score_documents(model, [Document(np.array([1, 9999]), 1, 1)], length=LENGTH)
    with pytest.raises(DataError, match="too short"):
        score_documents(model, [Document(np.array([1]), 1, 1)], length=LENGTH)


def test_standard_error_covers_the_truth() -> None:
    """Documents drawn from a known population: about 68 % of the estimates lie within one standard error."""
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(400):
        tokens = rng.integers(50, 500, 40)
        nll = tokens * (3.0 + 0.4 * rng.standard_normal(40))
        found = relative_error_of_total(Tally(nll, tokens, np.arange(40)))
        assert found is not None and found[1] == "documents"
        inside += abs(nll.sum() / tokens.sum() - 3.0) < found[0]
    assert 0.62 < inside / 400 < 0.74


def test_one_document_is_judged_by_its_windows_and_one_window_not_at_all() -> None:
    tally = Tally(np.array([30.0, 34.0, 29.0]), np.array([10, 10, 10]), np.zeros(3, dtype=np.int64))
    documents = [Document(np.arange(30), 15, 60)]
    found = relative_error_of_total(tally)
    assert found is not None and found[1] == "windows"
    assert found[0] == pytest.approx(np.std(tally.nll / 10, ddof=1) / np.sqrt(3))
    metrics, errors = perplexity_metrics(tally, documents)
    assert errors["bits_per_byte"] == pytest.approx(found[0] * 30 / 60 / math.log(2))
    assert errors["word_perplexity"] == pytest.approx(found[0] * 2 * metrics["word_perplexity"])
    single = Tally(np.array([30.0]), np.array([10]), np.zeros(1, dtype=np.int64))
    assert relative_error_of_total(single) is None
    assert perplexity_metrics(single, documents)[1]["loss"] is None


def test_without_text_only_tokens_count() -> None:
    tally = Tally(np.array([30.0, 34.0]), np.array([10, 12]), np.array([0, 1]))
    metrics, _ = perplexity_metrics(tally, [Document(np.arange(10), None, None), Document(np.arange(12), None, None)])
    assert set(metrics) == {"loss", "token_perplexity"}
