"""Choices as sequences of their own, in files of several forms, with different numbers of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tasks.task_models import SECTIONS, make_model, make_task, wordpiece

from mlm_cli.config.schema import TaskSection
from mlm_cli.errors import DataError
from mlm_cli.tasks.features import collate
from mlm_cli.tasks.labelled_text import Example
from mlm_cli.tasks.multiple_choice import MultipleChoice

QUESTIONS = [
    Example("the film was", None, "good", "f:1", ("bad", "good", "a man plays")),
    Example("a man plays", "in", "0", "f:2", ("rome", "guitar")),
]


def test_columns_and_lists_give_the_same(tmp_path: Path) -> None:
    rows = [("the film was", "1", ["bad", "good"]), ("a man", "0", ["plays", "rome"])]
    (tmp_path / "a.csv").write_text(
        "text,e0,e1,label\n" + "".join(f"{text},{c[0]},{c[1]},{label}\n" for text, label, c in rows)
    )
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps({"text": text, "choices": c, "label": int(label)}) + "\n" for text, label, c in rows)
    )

    def read(name: str, **keys: object) -> list[tuple[str, tuple[str, ...], str]]:
        section = TaskSection(name="multiple_choice", train="", dev="", **keys)  # type: ignore[arg-type]
        return [(e.text, e.choices, e.label) for e in MultipleChoice.read(str(tmp_path / name), section)]

    expected = [(text, tuple(choices), label) for text, label, choices in rows]
    assert read("a.csv", choice_columns=("e0", "e1")) == read("b.jsonl") == expected
    with pytest.raises(DataError, match=r"a\.csv:2 has 1 choices, and two or more are needed"):
        read("a.csv", choice_columns=("e0",))
    (tmp_path / "c.jsonl").write_text('{"text": "x", "choices": ["a", 3], "label": 0}\n')
    with pytest.raises(DataError, match=r"c\.jsonl:1: `choices` is \[\"a\", 3\], not a list of texts"):
        read("c.jsonl")


def test_each_question_is_weighed_by_itself(tmp_path: Path) -> None:
    tokenizer = wordpiece(tmp_path)
    task = make_task("multiple_choice", SECTIONS["bert"], tokenizer)
    features = task.features(QUESTIONS)
    assert len(features) == 2 and len(features.rows) == 5 and features.targets["labels"].tolist() == [1, 0]
    expected = [2, *tokenizer.encode("a man plays"), 3, *tokenizer.encode("in rome"), 3]
    assert features.rows[3].ids.tolist() == expected
    model = make_model("bert", task)
    with torch.no_grad():
        batch = collate(features, [1, 0])
        outputs = model(batch)
        alone = [model(collate(features, [unit])) for unit in (1, 0)]
    torch.testing.assert_close(outputs, torch.cat(alone), atol=1e-5, rtol=1e-5)
    loss, count = task.loss(outputs, batch)
    losses = [
        torch.nn.functional.cross_entropy(scores.T, torch.tensor([label]))
        for scores, label in zip(alone, (0, 1), strict=True)
    ]
    assert float(loss) == pytest.approx(float(sum(losses)) / 2, rel=1e-5) and int(count) == 2
    shares = task.predict(outputs, batch)
    for found, scores in zip(shares, alone, strict=True):
        np.testing.assert_allclose(found, scores[:, 0].softmax(0).numpy(), rtol=1e-4)
    assert task.loss_of(shares[::-1], QUESTIONS) == pytest.approx(float(loss), rel=1e-4)
    right, wrong = [np.array([0.1, 0.8, 0.1]), np.array([0.6, 0.4])], [np.array([0.5, 0.2, 0.3]), np.array([0.3, 0.7])]
    scored = task.score(right, QUESTIONS, seed=1)
    assert scored.metrics == {"accuracy": 1.0}
    assert scored.facts["chance_baseline"]["accuracy"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert task.score(wrong, QUESTIONS, seed=1).metrics == {"accuracy": 0.0}
    assert task.score(task.pool([right, wrong]), QUESTIONS, seed=1).metrics == {"accuracy": 0.5}


@pytest.mark.parametrize("label", ["3", "-1", "maybe"])
def test_a_label_must_name_a_choice(tmp_path: Path, label: str) -> None:
    task = make_task("multiple_choice", SECTIONS["gpt2"], wordpiece(tmp_path))
    with pytest.raises(DataError, match=rf"f:9: label `{label}` is neither a choice nor the number of one, 0 to 1"):
        task.features([Example("x", None, label, "f:9", ("a", "b"))])
