"""Dense retrieval: vectors of our embedding models against `transformers`, and an exact search among them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tasks.task_models import SECTIONS, make_model, make_task, wordpiece

from mlm_cli.config.retrieval_section import RetrievalSection
from mlm_cli.errors import CheckpointError, DataError
from mlm_cli.generation import dense
from mlm_cli.generation.dense import Embedder
from mlm_cli.generation.knowledge_base import open_knowledge_base
from mlm_cli.tasks.task_folder import save_task_model

TEXTS = ["the film was good", "a man plays guitar in rome and a man plays", "", "bad", "a good film was bad in rome"]


def save(folder: Path, layout: str = "bert", pooling: str = "mean", seed: int = 3, task: str = "embedding") -> Path:
    keys = {"pooling": pooling} if task == "embedding" else {}
    made = make_task(task, SECTIONS[layout], wordpiece(folder / "tok"), **keys)
    save_task_model(make_model(layout, made, seed=seed), made, folder / "model")
    return folder / "model"


@pytest.mark.parametrize(("layout", "pooling"), [("bert", "mean"), ("bert", "cls"), ("gpt2", "mean"), ("gpt2", "cls")])
def test_vectors_are_those_of_transformers(
    tmp_path: Path, layout: str, pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches of different lengths, over several groups; each as if it were alone."""
    monkeypatch.setattr(dense, "_TOGETHER", 3)
    monkeypatch.setattr(dense, "_BATCH", 2)
    folder = save(tmp_path, layout, pooling)
    found = Embedder(folder).vectors(iter(TEXTS))
    tokenizer, model = (
        transformers.AutoTokenizer.from_pretrained(folder),
        transformers.AutoModel.from_pretrained(folder),
    )
    special = layout == "bert"
    for text, vector in zip(TEXTS, found, strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False)
        ids = [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id] if special else ids or [tokenizer.sep_token_id]
        with torch.no_grad():
            states = model(torch.tensor([ids])).last_hidden_state[0].double().numpy()
        pooled = states.mean(0) if pooling == "mean" else states[0 if special else -1]
        np.testing.assert_allclose(vector, pooled / np.linalg.norm(pooled), atol=2e-5)


@pytest.fixture
def section(tmp_path: Path) -> RetrievalSection:
    (tmp_path / "a.txt").write_text("the film was good. a man plays guitar in rome. bad film. a good man in rome!")
    return RetrievalSection(
        documents=(str(tmp_path / "a.txt"),), retriever="dense", embedding_model=str(save(tmp_path)),
        passage_words=4, index=str(tmp_path / "index"),
    )  # fmt: skip


def test_the_search_is_exact_and_kept(section: RetrievalSection, monkeypatch: pytest.MonkeyPatch) -> None:
    base = open_knowledge_base(section)
    assert section.embedding_model is not None
    embedder, query = Embedder(Path(section.embedding_model)), "a film in rome"
    texts = list(base.passages.texts())
    cosines = embedder.vectors(texts).astype(np.float64) @ embedder.vectors([query])[0].astype(np.float64)
    found = base.search(query, 3, "here").passages
    assert [one.text for one, _ in found] == [texts[n] for n in np.argsort(-cosines)[:3]]
    np.testing.assert_allclose([score for _, score in found], np.sort(cosines)[::-1][:3], atol=1e-6)
    with pytest.raises(DataError, match="nothing to look up"):
        base.search(" ", 3, "here")
    monkeypatch.setattr("mlm_cli.generation.knowledge_base.read_documents", lambda *_: pytest.fail("made anew"))
    kept = open_knowledge_base(section).search(query, 3, "here").passages
    assert [one for one, _ in kept] == [one for one, _ in found]


def test_another_model_makes_it_anew(section: RetrievalSection, tmp_path: Path) -> None:
    before = open_knowledge_base(section).search("a film in rome", 5, "").passages
    save(tmp_path / "other", seed=11)
    os.replace(tmp_path / "other" / "model" / "model.safetensors", tmp_path / "model" / "model.safetensors")  # noqa: PTH105
    after = open_knowledge_base(section).search("a film in rome", 5, "").passages
    assert (
        after
        == open_knowledge_base(section.model_copy(update={"index": None})).search("a film in rome", 5, "").passages
    )
    assert [score for _, score in after] != [score for _, score in before]


def test_a_model_of_another_task_is_refused(section: RetrievalSection, tmp_path: Path) -> None:
    other = save(tmp_path / "c", task="classification")
    with pytest.raises(CheckpointError, match="not a model for embedding"):
        open_knowledge_base(section.model_copy(update={"embedding_model": str(other)}))
