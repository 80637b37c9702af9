"""SQuAD's scores against the official ones, windows against a copy of their definition, spans by brute force."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tasks.task_models import SECTIONS, make_task, wordpiece

from mlm_cli.config.schema import ModelSection, TaskSection
from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.errors import DataError, UsageError
from mlm_cli.tasks.batches import evaluation_batches
from mlm_cli.tasks.encoding import TextEncoder
from mlm_cli.tasks.question_answering import Candidate, QuestionAnswering, most_context, window_starts
from mlm_cli.tasks.squad import Question, answer_f1, best_threshold, normalize_answer, read_squad, squad_scores


def test_scores_are_those_of_the_official_script(test_data: Path) -> None:
    folder = test_data / "reference/squad_eval"
    questions = read_squad(test_data / "finetune/xquad/xquad.en.part-a.json")
    expected = json.loads((folder / "expected.part-a.json").read_text())
    assert len(expected) == 3
    for system, values in expected.items():
        predictions = json.loads((folder / f"predictions.{system}.part-a.json").read_text())
        found = squad_scores(predictions, questions)
        assert len(questions) == values["questions"]
        assert 100 * found["exact_match"].mean() == pytest.approx(values["exact_match"], abs=1e-9)
        assert 100 * found["f1"].mean() == pytest.approx(values["f1"], abs=1e-9)


def test_answers_are_compared_without_what_does_not_matter() -> None:
    assert normalize_answer("  The  Broncos' (Super) Bowl, an event ") == "broncos super bowl event"
    assert answer_f1("the cat sat", "a cat") == pytest.approx(2 / 3)
    assert answer_f1("", "cat") == 0.0


def check_is_max_context(spans: list[tuple[int, int]], current: int, position: int) -> bool:
    """As BERT's ``run_squad.py`` defines it."""
    best_score, best_index = None, None
    for index, (start, length) in enumerate(spans):
        end = start + length - 1
        if position < start or position > end:
            continue
        score = min(position - start, end - position) + 0.01 * length
        if best_score is None or score > best_score:
            best_score, best_index = score, index
    return current == best_index


@pytest.mark.parametrize(
    ("length", "room", "stride"), [(0, 5, 2), (1, 5, 2), (5, 5, 2), (23, 7, 3), (40, 12, 5), (31, 6, 6), (31, 6, 99)]
)
def test_each_token_counts_in_the_window_with_most_context(length: int, room: int, stride: int) -> None:
    starts = window_starts(length, room, stride)
    spans = [(start, min(room, length - start)) for start in starts]
    for (start, size), (low, high), number in zip(spans, most_context(length, starts, room), range(99), strict=False):
        expected = [p for p in range(start, start + size) if check_is_max_context(spans, number, p)]
        assert list(range(low, high)) == expected
    assert starts[-1] + room >= length and all(b - a <= min(stride, room) for a, b in pairwise(starts))


@pytest.mark.parametrize("language", ["en", "de"])
def test_labels_are_the_answer_in_real_texts(test_data: Path, language: str) -> None:
    tokenizer = load_tokenizer(test_data / "tokenizers/bert-base-cased")
    questions = read_squad(test_data / f"finetune/xquad/xquad.{language}.part-a.json")[:200]
    section = TaskSection(name="question_answering", train="", dev="", doc_stride=40)
    task = QuestionAnswering(section, TextEncoder(tokenizer, ModelSection(family="bert", num_token_types=2), 128))
    features = task.features(questions)
    assert len(features) > 2 * len(questions)
    found: dict[int, int] = {}
    exact = 0
    for row, label, window in zip(features.rows, features.targets["labels"], features.targets["windows"], strict=True):
        question = questions[window[0]]
        assert row.types[: window[1]].sum() == 0 and row.ids[window[1] - 1] == 102
        if label[1] == 0:
            continue
        found[window[0]] = found.get(window[0], 0) + 1
        ids = tokenizer.encode(question.answers[0][0])
        exact += row.ids[label[0] : label[1] + 1].tolist() == ids
    assert len(found) > 190  # an answer across the edges of all windows is in none
    assert exact > 0.95 * sum(found.values())  # words cut inside are other pieces


def perfect(features: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Outputs that are sure of the labels."""
    outputs = torch.zeros(*batch["tokens"].shape, 2)
    for row, (start, end) in enumerate(batch["labels"].tolist()):
        outputs[row, start, 0] = outputs[row, end, 1] = 9.0
    return outputs


def test_sure_outputs_give_the_answers_back(test_data: Path) -> None:
    tokenizer = load_tokenizer(test_data / "tokenizers/bert-base-uncased")
    questions = read_squad(test_data / "finetune/xquad/xquad.en.part-a.json")[:120]
    section = TaskSection(name="question_answering", train="", dev="", doc_stride=64)
    task = QuestionAnswering(section, TextEncoder(tokenizer, ModelSection(family="bert", num_token_types=2), 160))
    features = task.features(questions)
    predicted: dict[int, Any] = {}
    for batch in evaluation_batches(features, batch_size=32):
        outputs = perfect(features, batch)
        outputs[:, 0] = 0  # what says "not here" is no candidate
        predicted.update(zip(batch["sample_ids"].tolist(), task.predict(outputs, batch), strict=True))
    ordered = [predicted[unit] for unit in range(len(features))]
    answers = task.answers(ordered, features, questions)
    scores = task.score(answers, questions, seed=1)
    assert scores.metrics["f1"] > 0.97 and scores.metrics["exact_match"] > 0.93
    texts = json.loads(scores.predictions["predictions.json"])
    nbest = json.loads(scores.predictions["nbest.json"])
    assert list(texts) == [question.id for question in questions]
    for question in questions:
        best = nbest[question.id]
        assert best[0]["text"] == texts[question.id] and len(best) <= 20
        assert sum(item["probability"] for item in best) == pytest.approx(1, abs=1e-4)
        assert all(question.context[b["start"] :].startswith(b["text"]) for b in best)


def test_models_with_other_tokens_are_pooled_by_characters(tmp_path: Path) -> None:
    task = make_task("question_answering", SECTIONS["bert"], wordpiece(tmp_path))
    question = Question("1", "who", "a man plays guitar", (("a man", 0),), "here")
    one = [[Candidate(0.6, 0, 5), Candidate(0.4, 12, 18)]]
    other = [[Candidate(0.9, 12, 18), Candidate(0.1, 2, 5)]]
    pooled = task.pool([one, other])
    assert [(c.start, c.end, round(c.share, 6)) for c in pooled[0]] == [(12, 18, 0.65), (0, 5, 0.3), (2, 5, 0.05)]
    assert json.loads(task.score(pooled, [question], seed=1).predictions["predictions.json"]) == {"1": "guitar"}
    assert task.score(one, [question], seed=1).metrics == {"f1": 1.0, "exact_match": 1.0}
    assert task.score([[]], [question], seed=1).facts["unanswered"] == 1


def test_spans_are_the_best_of_all_pairs(tmp_path: Path) -> None:
    task = make_task("question_answering", SECTIONS["bert"], wordpiece(tmp_path), n_best=40, max_answer_length=4)
    rng = np.random.default_rng(0)
    start, end = rng.normal(size=32), rng.normal(size=32)
    window = np.array([0, 5, 20, 100, 103, 112])
    found = task._best_spans(start, end, window)  # type: ignore[attr-defined]
    pairs = [
        (start[i] + end[j], 95 + i, 95 + j) for i in range(8, 17) for j in range(i, min(i + 4, 25))
    ]  # tokens 103 to 111 stand at 8 to 16
    expected = np.array(sorted(pairs, key=lambda pair: -pair[0]))[:40]
    np.testing.assert_allclose(found, expected)


def test_mistakes_name_their_place(tmp_path: Path) -> None:
    def write(document: Any) -> Path:
        (tmp_path / "q.json").write_text(document if isinstance(document, str) else json.dumps(document))
        return tmp_path / "q.json"

    def paragraph(**qa: Any) -> Any:
        base = {"id": "7", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 0}]}
        return {"data": [{"paragraphs": [{"context": "Ada did it.", "qas": [{**base, **qa}]}]}]}

    assert read_squad(write(paragraph()))[0].answers == (("Ada", 0),)
    assert read_squad(write(paragraph(answers=[{"text": "it", "answer_start": 3}])))[0].answers == (("it", 8),)
    for document, message in (
        ("{", r"q\.json:1 is not JSON"),
        ({"data": []}, "holds no questions"),
        ([1], r"q\.json: `data` is missing"),
        (paragraph(question=None), r"data\[0\]\.paragraphs\[0\]\.qas\[0\]: `question` is missing"),
        (paragraph(answers=[], is_impossible=True), r"\(id 7\) has no answer"),
        (paragraph(answers=[{"text": "Ada"}]), r"\(id 7\): `answer_start` is missing"),
    ):
        with pytest.raises(DataError, match=message):
            read_squad(write(document))
    assert read_squad(write(paragraph(answers=[], is_impossible=True)), without_answer=True)[0].answers == ()
    with pytest.raises(DataError, match="No such file"):
        read_squad(tmp_path / "absent.json")
    task = make_task("question_answering", SECTIONS["bert"], wordpiece(tmp_path / "tok"))
    long = Question("1", "a " * 40, "the film", (("film", 4),), "here")
    with pytest.raises(UsageError, match="leaves no room for its text in 32"):
        task.features([long])
    lost = Question("1", "who", "the film", (("film", -1),), "here")
    assert len(task.features([lost])) == 1 and len(task.features([lost], training=True)) == 0


def without_answers(questions: list[Question]) -> list[Question]:
    """Every third question on the text of another article, which does not hold its answer."""
    return [
        replace(question, context=questions[-1 - place].context, answers=()) if place % 3 == 0 else question
        for place, question in enumerate(questions)
    ]


def second_task(test_data: Path, threshold: float) -> QuestionAnswering:
    tokenizer = load_tokenizer(test_data / "tokenizers/bert-base-uncased")
    section = TaskSection(
        name="question_answering", train="", dev="", doc_stride=64, null_score_diff_threshold=threshold
    )
    return QuestionAnswering(section, TextEncoder(tokenizer, ModelSection(family="bert", num_token_types=2), 160))


def test_questions_without_answer(test_data: Path) -> None:
    """Sure outputs give every answer back and "none" where there is none, in texts of several windows."""
    questions = without_answers(read_squad(test_data / "finetune/xquad/xquad.en.part-a.json")[:120])
    task = second_task(test_data, 0.0)
    features = task.features(questions, training=True)
    assert len({window[0] for window in features.targets["windows"]}) == len(questions)  # they are learned from too
    predicted: dict[int, Any] = {}
    for batch in evaluation_batches(features, batch_size=32):
        found = task.predict(perfect(features, batch), batch)
        predicted.update(zip(batch["sample_ids"].tolist(), found, strict=True))
    answers = task.answers([predicted[unit] for unit in range(len(features))], features, questions)
    scores = task.score(answers, questions, seed=1)
    assert scores.metrics["no_answer_accuracy"] == 1.0 and scores.metrics["has_answer_f1"] > 0.95
    texts, odds = (json.loads(scores.predictions[f"{name}.json"]) for name in ("predictions", "null_odds"))
    for question in questions:
        assert (texts[question.id] == "") == (odds[question.id] > 0)
    assert all(texts[question.id] == "" for question in questions[::3])
    assert scores.facts["best_f1"] == pytest.approx(scores.metrics["f1"])
    never = second_task(test_data, 1e6).score(answers, questions, seed=1)
    assert all(json.loads(never.predictions["predictions.json"]).values())
    assert never.facts["best_f1"] == scores.facts["best_f1"] and never.facts["unanswered"] == 0
    assert never.metrics["has_answer_f1"] >= scores.metrics["has_answer_f1"]
    pooled = task.score(task.pool([answers, answers]), questions, seed=1)
    assert pooled.metrics == scores.metrics


def test_every_window_has_to_say_that_there_is_no_answer(tmp_path: Path) -> None:
    task = make_task(
        "question_answering", SECTIONS["bert"], wordpiece(tmp_path), null_score_diff_threshold=1.0, doc_stride=2
    )
    question = Question("1", "who", "a man plays guitar in rome a man plays guitar in rome " * 3, (), "here")
    features = task.features([question])
    assert len(features) > 1 and not features.targets["labels"].any()
    spans = np.array([[-1.0, -1, -1], [2.0, 0, 1]])
    quiet = np.array([[9.0, -1, -1], [1.0, 2, 3]])
    for null, expected in ((2.5, "a man"), (3.5, "")):
        first = spans.copy()
        first[0, 0] = null
        answers = task.answers([first, *[quiet] * (len(features) - 1)], features, [question])
        scores = task.score(answers, [question], seed=1)
        assert json.loads(scores.predictions["predictions.json"]) == {"1": expected}
        assert json.loads(scores.predictions["null_odds.json"])["1"] == pytest.approx(null - 2.0)
        assert scores.metrics["f1"] == float(expected == "")
    with pytest.raises(UsageError, match="its first token sees no other"):
        make_task("question_answering", SECTIONS["gpt2"], wordpiece(tmp_path), null_score_diff_threshold=0.0)


def official_scores(golds: list[str], predicted: str) -> tuple[float, float]:
    """Exact match and F1 of one question as ``evaluate-v2.0.py`` defines them."""

    def f1(gold: str) -> float:
        one, other = normalize_answer(gold).split(), normalize_answer(predicted).split()
        shared = sum((Counter(one) & Counter(other)).values())
        if not one or not other:
            return float(one == other)
        if not shared:
            return 0.0
        precision, recall = shared / len(other), shared / len(one)
        return 2 * precision * recall / (precision + recall)

    golds = [gold for gold in golds if normalize_answer(gold)] or [""]
    return max(float(normalize_answer(gold) == normalize_answer(predicted)) for gold in golds), max(map(f1, golds))


def test_scores_of_the_second_version() -> None:
    cases = [
        ((), ""), ((), "the"), ((), "a cat"), (("the cat",), ""), (("the", "cat sat"), "cat"), (("the",), ""),
        (("cat", "dog"), "dog"), (("a cat",), "cat mat"),
    ]  # fmt: skip
    questions = [Question(str(n), "", "", tuple((gold, 0) for gold in golds), "") for n, (golds, _) in enumerate(cases)]
    found = squad_scores({str(n): predicted for n, (_, predicted) in enumerate(cases)}, questions)
    expected = [official_scores(list(golds), predicted) for golds, predicted in cases]
    np.testing.assert_allclose(np.stack([found["exact_match"], found["f1"]], -1), expected)


def test_best_threshold_is_that_of_all_thresholds() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 40):
        for _ in range(50):
            has_answer, answered = rng.random(size) < 0.5, rng.random(size) < 0.9
            scores = np.where(has_answer, rng.random(size) * answered, ~answered)
            null = rng.integers(-3, 4, size).astype(float)  # with ties

            def mean(threshold: float, scores: Any = scores, has: Any = has_answer, null: Any = null) -> float:
                return float(np.where(null > threshold, ~has, scores).mean())

            best, threshold = best_threshold(scores, answered, has_answer, null)
            assert best == pytest.approx(max(mean(limit) for limit in (-9.0, *null)))
            assert mean(threshold) == pytest.approx(best)


def test_models_that_always_answer_are_not_pooled_with_others() -> None:
    always = TaskSection(name="question_answering", train="", dev="")
    perhaps = always.model_copy(update={"null_score_diff_threshold": 0.0})
    for fine in ({"a": always, "b": always}, {"a": perhaps, "b": perhaps}, {"a": perhaps}):
        QuestionAnswering.check_together(fine)
    with pytest.raises(UsageError, match="b always answers"):
        QuestionAnswering.check_together({"a": perhaps, "b": always})
