"""Entities against the official scorer, CoNLL files, and tags on pieces against transformers' alignment."""

from __future__ import annotations

import gzip
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tasks.task_models import SECTIONS, make_task, wordpiece

from mlm_cli.config.schema import ModelSection, TaskSection
from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.errors import DataError
from mlm_cli.tasks.batches import evaluation_batches
from mlm_cli.tasks.conll import Sentence, read_conll
from mlm_cli.tasks.encoding import TextEncoder
from mlm_cli.tasks.entities import EntityCounts, entities
from mlm_cli.tasks.features import IGNORED
from mlm_cli.tasks.token_classification import TokenClassification


def test_scores_are_those_of_the_official_scorer(test_data: Path) -> None:
    folder = test_data / "reference/conlleval"
    gold, predicted = (read_conll(folder / "ground_truth.txt", 0, column) for column in (2, 3))
    counts = EntityCounts()
    for there, found in zip(gold, predicted, strict=True):
        counts.add(there.tags, found.tags)
    report = (folder / "expected.txt").read_text()
    totals = [int(text) for text in re.findall(r"\d+", report.splitlines()[0])]
    assert [counts.tokens, counts.gold.total(), counts.found.total(), counts.right.total()] == totals
    rows = re.findall(
        r"(\w+):\s+(?:accuracy: .*?; )?precision: +([\d.]+)%; recall: +([\d.]+)%; FB1: +([\d.]+)  (\d+)", report
    )
    assert len(rows) == 6
    for kind, *numbers, found in rows:
        scores = counts.scores([kind])
        ours = [f"{100 * scores[name]:.2f}" for name in ("precision", "recall", "f1")]
        assert [*ours, str(counts.found[kind])] == [*numbers, found], kind
    whole = re.search(r"accuracy: +([\d.]+)%; precision: +([\d.]+)%; recall: +([\d.]+)%; FB1: +([\d.]+)", report)
    assert whole is not None
    scores = counts.scores()
    ours = [counts.accuracy(), scores["precision"], scores["recall"], scores["f1"]]
    assert [f"{100 * value:.2f}" for value in ours] == list(whole.groups())


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-A I-A O", [("A", 0, 1)]),
        ("I-A I-A B-A", [("A", 0, 1), ("A", 2, 2)]),  # IOB1: B only where entities touch
        ("B-A I-B O I-B", [("A", 0, 0), ("B", 1, 1), ("B", 3, 3)]),
        ("I-A E-A I-A O", [("A", 0, 1), ("A", 2, 2)]),
        ("S-A B-A I-A E-A S-B", [("A", 0, 0), ("A", 1, 3), ("B", 4, 4)]),
        ("U-A B-A L-A L-A", [("A", 0, 0), ("A", 1, 2), ("A", 3, 3)]),
        ("O O", []),
        ("", []),
    ],
)
def test_entities_of_every_scheme(tags: str, expected: list[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == expected


def test_files_of_many_forms(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_text("-DOCSTART- -X- O O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n\t\nPeter\tNNP\tB-NP\tB-PER\r\n")
    found = read_conll(path)
    assert [sentence.tokens for sentence in found] == [("EU", "rejects"), ("Peter",)]
    assert [sentence.tags for sentence in found] == [("B-ORG", "O"), ("B-PER",)]
    assert [sentence.where.rpartition(":")[2] for sentence in found] == ["3", "7"]
    assert read_conll(path, 1, 2)[0].tokens == ("NNP", "VBZ")
    (tmp_path / "b.conll.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert read_conll(tmp_path / "b.conll.gz")[1].tags == ("B-PER",)
    for content, message in (
        ("EU B-ORG\nrejects\n", r"c\.conll:2 has a token and no tag"),
        ("", "holds no sentences"),
    ):
        (tmp_path / "c.conll").write_text(content)
        with pytest.raises(DataError, match=message):
            read_conll(tmp_path / "c.conll")
    with pytest.raises(DataError, match=r"a\.conll:3 has 4 columns; column 0 and 7"):
        read_conll(path, 0, 7)


def sentence(text: str) -> Sentence:
    pairs = [item.rsplit("/", 1) for item in text.split()]
    return Sentence(tuple(word for word, _ in pairs), tuple(tag for _, tag in pairs), "f.conll:1")


def test_labels_of_a_file_are_whole_types() -> None:
    section = TaskSection(train="", dev="")
    found = TokenClassification.find_labels([sentence("rome/B-LOC is/O")], section)
    assert found == ("B-LOC", "I-LOC", "O")
    assert TokenClassification.find_labels([sentence("x/N y/V")], section) == ("N", "V")
    with pytest.raises(DataError, match="two or more kinds"):
        TokenClassification.find_labels([sentence("x/O")], section)


def test_a_tag_stands_on_the_first_piece(tmp_path: Path) -> None:
    task = make_task("token_classification", SECTIONS["bert"], wordpiece(tmp_path))
    features = task.features([sentence("films/O in/O rome/B-LOC \x01/O")])
    tokenizer = task.encoder.tokenizer
    row, labels = features.rows[0], (features.token_labels or ())[0]
    names = {number: token for token, number in tokenizer.token_ids.items()}
    assert [names[number] for number in row.ids] == ["[CLS]", "film", "##s", "in", "rome", "[UNK]", "[SEP]"]
    assert labels.tolist() == [IGNORED, 2, IGNORED, 2, 0, 2, IGNORED]
    with pytest.raises(
        DataError, match=r"f\.conll:1: tag `B-PER` in this sentence is not one of `B-LOC`, `I-LOC`, `O`"
    ):
        task.features([sentence("x/B-PER")])


def test_pieces_are_those_of_transformers_on_real_sentences(test_data: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(test_data / "tokenizers/bert-base-cased")
    tokenizer.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    sentences = read_conll(test_data / "finetune/wnut17/emerging.dev.conll")[:150]
    model = ModelSection(family="bert", num_token_types=2)
    labels = TokenClassification.find_labels(sentences, TaskSection(train="", dev=""))
    task = TokenClassification(TaskSection(train="", dev=""), TextEncoder(tokenizer, model, 512), labels)
    features = task.features(sentences)
    compared = 0
    for row, targets, gold in zip(features.rows, features.token_labels or (), sentences, strict=True):
        encoding = theirs(list(gold.tokens), is_split_into_words=True)
        words = encoding.word_ids()
        if len({word for word in words if word is not None}) < len(gold.tokens):
            continue  # a token that their tokenizer leaves nothing of; ours reads it as unknown
        assert row.ids.tolist() == encoding["input_ids"]
        firsts = [place for place, word in enumerate(words) if word is not None and word != words[place - 1]]
        assert np.flatnonzero(targets != IGNORED).tolist() == firsts
        assert [labels[number] for number in targets[firsts]] == list(gold.tags)
        compared += 1
    assert compared > 140


@pytest.mark.parametrize("layout", ["bert", "gpt2"])
def test_long_sentences_are_tagged_whole(tmp_path: Path, layout: str) -> None:
    """Right outputs for every row make right tags for every token, whatever was cut where."""
    task = make_task("token_classification", SECTIONS[layout], wordpiece(tmp_path))
    rng = random.Random(3)
    sentences = [
        Sentence(
            tuple(rng.choice(["films", "rome", "guitars", "a", "x" * 60]) for _ in range(length)),
            tuple(rng.choice(task.labels) for _ in range(length)),
            "f:1",
        )
        for length in (1, 5, 70, 33)
    ]
    features = task.features(sentences)
    assert len(features) > 8 and max(features.lengths) <= 32
    predicted: dict[int, np.ndarray] = {}
    total = 0
    for batch in evaluation_batches(features, batch_size=3):
        outputs = torch.nn.functional.one_hot(batch["labels"].clamp(min=0), 3).float() * 9
        loss, count = task.loss(outputs, batch)
        assert loss < 1e-3
        total += int(count)
        predicted.update(zip(batch["sample_ids"].tolist(), task.predict(outputs, batch), strict=True))
    assert total == 109
    answers = task.answers([predicted[unit] for unit in range(len(features))], features, sentences)
    scores = task.score(answers, sentences, seed=1)
    assert task.loss_of(answers, sentences) < 1e-3
    assert scores.metrics == {"f1": 1.0, "precision": 1.0, "recall": 1.0, "accuracy": 1.0}
    (tmp_path / "p.conll").write_text(scores.predictions["predictions.conll"])
    again = read_conll(tmp_path / "p.conll")
    assert [found.tags for found in again] == [given.tags for given in sentences]
    none = [np.tile([0, 0, 1.0], (len(given.tokens), 1)) for given in sentences]
    assert task.score(none, sentences, seed=1).metrics["f1"] == 0.0
    pooled = task.score(task.pool([none, answers, answers]), sentences, seed=1)  # two against one
    assert pooled.metrics == scores.metrics
    turned = task.reordered([shares[:, [2, 0, 1]] for shares in answers], [1, 2, 0])
    assert all(np.array_equal(one, other) for one, other in zip(turned, answers, strict=True))
