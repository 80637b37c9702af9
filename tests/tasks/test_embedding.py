"""Embeddings: pooling and losses against their formulas in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tasks.task_models import SECTIONS, make_batch, make_model, make_task, wordpiece

from mlm_cli.config.schema import TaskSection
from mlm_cli.errors import DataError
from mlm_cli.tasks.embedding import Embedding
from mlm_cli.tasks.features import collate
from mlm_cli.tasks.labelled_text import Example

PAIRS = [
    Example("the film was good", "a good film", "5", "f:1"),
    Example("a man plays", "in rome", "1", "f:2"),
    Example("guitars", "a man plays guitar", "4", "f:3"),
]


@pytest.mark.parametrize("layout", ["bert", "gpt2"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pooling(tmp_path: Path, layout: str, pooling: str) -> None:
    task = make_task("embedding", SECTIONS[layout], wordpiece(tmp_path), pooling=pooling)
    model, batch = make_model(layout, task), make_batch()
    with torch.no_grad():
        states = model.backbone.run(batch["tokens"], model.backbone.info(batch)).double().numpy()
        found = model(batch)
    for row, length in enumerate(batch["lengths"].tolist()):
        real = states[row, :length]
        pooled = real.mean(0) if pooling == "mean" else real[0 if layout == "bert" else -1]
        np.testing.assert_allclose(found[row].numpy(), pooled / np.linalg.norm(pooled), atol=1e-5)


@pytest.mark.parametrize("loss", ["cosine", "contrastive"])
def test_losses_are_their_formulas(tmp_path: Path, loss: str) -> None:
    task = make_task("embedding", SECTIONS["bert"], wordpiece(tmp_path), loss=loss, max_score=5, temperature=0.1)
    features = task.features(PAIRS)
    assert len(features) == 3 and len(features.rows) == 6
    np.testing.assert_allclose(features.targets["labels"], [1, 0.2, 0.8])
    batch = collate(features, [0, 1, 2])
    with torch.no_grad():
        outputs = make_model("bert", task)(batch)
    vectors = outputs.double().numpy()
    first, second = vectors[0::2], vectors[1::2]
    cosines = (first * second).sum(1)
    if loss == "cosine":
        expected, number = np.mean((cosines - [1, 0.2, 0.8]) ** 2), 3
    else:
        shares = np.exp(first @ second.T / 0.1)
        each = -np.log(np.diag(shares) / shares.sum(1))
        expected, number = each[[0, 2]].mean(), 2  # the pair with score 0.2 is only something to tell apart
    found, count = task.loss(outputs, batch)
    assert float(found) == pytest.approx(expected, rel=1e-4) and int(count) == number
    np.testing.assert_allclose(task.predict(outputs, batch), cosines, atol=1e-6)
    answers = task.predict(outputs, batch)
    if loss == "cosine":
        assert task.loss_of(answers, PAIRS) == pytest.approx(expected, rel=1e-4)
    else:
        assert np.isnan(task.loss_of(answers, PAIRS))
    assert task.score([0.9, 0.1, 0.5], PAIRS, seed=1).metrics["spearman"] == pytest.approx(1)
    learned = task.features(PAIRS, training=True)
    assert len(learned) == (3 if loss == "cosine" else 2)


def test_mistakes(tmp_path: Path) -> None:
    task = make_task("embedding", SECTIONS["bert"], wordpiece(tmp_path))
    with pytest.raises(DataError, match=r"f:1: score 5 is beyond task\.max_score 1"):
        task.features(PAIRS)
    (tmp_path / "a.tsv").write_text("x\t1\n")
    section = TaskSection(name="embedding", train="", dev="", text_column=0, label_column=1)
    with pytest.raises(DataError, match="pairs"):
        Embedding.read(str(tmp_path / "a.tsv"), section)
