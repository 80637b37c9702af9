"""Masked language modelling first, then every kind of task: the commands in the heads of the recipes, on real data."""

from __future__ import annotations

import gzip
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlm_cli.cli.app import run
from mlm_cli.config.builtin import recipes_root
from mlm_cli.config.resolve import resolve_recipe
from mlm_cli.config.schema import Recipe
from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.jobs import finetune

Write = Callable[[Path, Path], None]


def commands(name: str) -> list[list[str]]:
    """The command lines in the head of a recipe."""
    head = (recipes_root() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return [shlex.split(line.removeprefix("#   mlm ")) for line in head if line.startswith("#   mlm ")]


def read(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pretrained(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which the commands of debug/bert were given: ``runs/debug-bert``."""
    folder = tmp_path_factory.mktemp("bert")
    novel = sorted((test_data / "corpora/english_novels").glob("*.gz"))[0]
    (folder / "book.txt").write_text(read(novel)[:150_000], encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in commands("debug/bert"):
            assert run([*command]) == 0, command
    return folder


def pairs(test_data: Path, folder: Path) -> None:
    rows = [line.split("\t") for line in read(test_data / "finetune/paws/dev.tsv.gz").splitlines()[1:]]
    write_rows(folder, [(first.strip("b'\""), second.strip("b'\""), label) for _, first, second, label in rows])


def scored(test_data: Path, folder: Path) -> None:
    rows = [line.split("\t") for line in read(test_data / "finetune/stsb/sts-dev.tsv").splitlines()]
    write_rows(folder, [(row[5], row[6], row[4]) for row in rows])


def write_rows(folder: Path, rows: list[tuple[str, ...]]) -> None:
    for name, part in (("train.tsv", rows[:400]), ("dev.tsv", rows[400:480])):
        (folder / name).write_text("".join("\t".join(row) + "\n" for row in part), encoding="utf-8")


def tagged(test_data: Path, folder: Path) -> None:
    for name, file, count in (("train", "wnut17train.conll", 300), ("dev", "emerging.dev.conll", 80)):
        sentences = [s for s in read(test_data / "finetune/wnut17" / file).replace("\n\t\n", "\n\n").split("\n\n") if s]
        (folder / f"{name}.conll").write_text("\n\n".join(sentences[:count]) + "\n", encoding="utf-8")


def questions(test_data: Path, folder: Path) -> None:
    articles = json.loads(read(test_data / "finetune/xquad/xquad.en.part-a.json"))["data"]
    for name, part in (("train", articles[:3]), ("dev", articles[3:4])):
        (folder / f"{name}.json").write_text(json.dumps({"data": part}))


def choices(test_data: Path, folder: Path) -> None:
    lines = read(test_data / "eval/olmes/piqa/rc_0shot/requests.jsonl.gz").splitlines()
    docs = {entry["doc_id"]: entry["doc"] for entry in map(json.loads, lines[:800])}
    rows = [
        json.dumps({"text": doc["goal"], "choices": [doc["sol1"], doc["sol2"]], "label": doc["label"]})
        for doc in docs.values()
    ]
    for name, part in (("train", rows[:300]), ("dev", rows[300:360])):
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n")


KINDS: list[Any] = [
    pytest.param("bert-classification", "classification", pairs, "accuracy", 80),
    pytest.param("bert-regression", "regression", scored, "spearman", 80),
    pytest.param("bert-ner", "token_classification", tagged, "f1", 80),
    pytest.param("bert-qa", "question_answering", questions, "f1", None),
    pytest.param("bert-choice", "multiple_choice", choices, "accuracy", 60, marks=pytest.mark.slow),
    pytest.param("bert-embedding", "embedding", scored, "spearman", 80),
]


@pytest.mark.parametrize(("name", "task", "write", "metric", "count"), KINDS)
def test_every_kind_of_task_from_a_bert_run(
    test_data: Path,
    pretrained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    task: str,
    write: Write,
    metric: str,
    count: int | None,
) -> None:
    """It trains, keeps the best by the right metric, and ``mlm evaluate`` gives that score again."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/debug-bert").symlink_to(pretrained / "runs/debug-bert")
    write(test_data, tmp_path)
    monkeypatch.chdir(tmp_path)
    tune, score = commands(f"debug/{name}")[-2:]
    assert tune[0] == "finetune" and score[:1] == ["evaluate"] and score[-1] == task
    assert run([*tune, "log.every=1", "log.tensorboard=false"]) == 0
    folder = tmp_path / "runs" / f"debug-{name}"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records]
    assert sum(losses[-10:]) < sum(losses[:10])
    found = {record["step"]: record[f"dev_{metric}"] for record in records if record.get(f"dev_{metric}") is not None}
    assert sorted(found) == [10, 20, 30, 40, 50]
    best = max(found, key=lambda step: (found[step], -step))
    assert (folder / "best").read_text().strip() == f"step-{best:08d}"
    capsys.readouterr()
    assert run([*score, "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["results"][task][f"{metric},none"] == pytest.approx(found[best], abs=2e-3)
    if count is not None:
        assert document["n-samples"][task]["effective"] == count
    check_predictions(folder / "evaluate", task, document["results"][task])


def check_predictions(folder: Path, task: str, results: dict[str, Any]) -> None:
    """Files that the field's own scorers read say the same as the results."""
    if task == "token_classification":
        from mlm_cli.tasks.conll import read_conll
        from mlm_cli.tasks.entities import EntityCounts

        counts = EntityCounts()
        gold, predicted = (read_conll(folder / "predictions.conll", 0, column) for column in (1, 2))
        for there, found in zip(gold, predicted, strict=True):
            counts.add(there.tags, found.tags)
        assert counts.accuracy() == pytest.approx(results["accuracy,none"])
    elif task == "question_answering":
        from mlm_cli.tasks.squad import read_squad, squad_scores

        predictions = json.loads((folder / "predictions.json").read_text())
        scores = squad_scores(predictions, read_squad(folder.parents[2] / "dev.json"))
        assert scores["f1"].mean() == pytest.approx(results["f1,none"])


def test_a_result_opens_in_transformers_with_the_scores_reported(
    test_data: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    pairs(test_data, tmp_path)
    monkeypatch.chdir(pretrained)
    recipe = resolve_recipe(
        "debug/bert-classification",
        [f"task.train={tmp_path}/train.tsv", f"task.dev={tmp_path}/dev.tsv", "train.steps=20", "evaluate.every=20"],
        overlay={"output": str(tmp_path / "run")},
        verb="finetune",
    )
    assert finetune.run(recipe) == 0
    folder = tmp_path / "run/step-00000020/model"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert type(model).__name__ == "MegatronBertForSequenceClassification"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    right, rows = 0, [line.split("\t") for line in (tmp_path / "dev.tsv").read_text().splitlines()]
    with torch.no_grad():
        for first, second, label in rows:
            inputs = tokenizer(first, second, truncation=True, max_length=64, return_token_type_ids=True)
            logits = model(**{key: torch.tensor([value]) for key, value in inputs.items()}).logits
            right += model.config.id2label[int(logits.argmax())] == label
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["dev_accuracy"] == pytest.approx(right / len(rows), abs=0.015)


def finetune_on_ranks(rank: int, world_size: int, values: dict[str, Any]) -> int:
    return finetune.run(Recipe(**values))


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "tensor", "zero"), [(2, 2, 1), (2, 1, 1), (2, 1, 3)])
def test_any_layout_learns_the_same(
    test_data: Path,
    pretrained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_ranks: Any,
    world_size: int,
    tensor: int,
    zero: int,
) -> None:
    questions(test_data, tmp_path)
    monkeypatch.chdir(pretrained)
    keys = [f"task.train={tmp_path}/train.json", f"task.dev={tmp_path}/dev.json", "train.steps=12", "evaluate.every=6"]

    def recipe(name: str, *more: str) -> Recipe:
        overlay = {"output": str(tmp_path / name)}
        return resolve_recipe("debug/bert-qa", [*keys, "log.every=1", *more], overlay=overlay, verb="finetune")

    assert finetune.run(recipe("one")) == 0
    many = recipe("many", f"parallel.tensor={tensor}", f"parallel.zero={zero}")
    assert run_ranks(finetune_on_ranks, world_size, many.model_dump(exclude_unset=True)) == [0] * world_size
    records = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "many")
    ]
    assert len(records[0]) == len(records[1]) == 12
    for first, second in zip(*records, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=5e-4), first["step"]
        assert second["tokens"] == first["tokens"]


def test_the_tokenizer_travels(pretrained: Path) -> None:
    step = (pretrained / "runs/debug-bert/latest").read_text().strip()
    ours, given = load_tokenizer(pretrained / "runs/debug-bert" / step / "model"), load_tokenizer(pretrained / "tok")
    assert ours.fingerprint == given.fingerprint and ours.cls_id is not None


def test_questions_without_answer(
    test_data: Path,
    pretrained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """SQuAD 2.0 is refused with the key that takes it; the threshold travels with the model, and can be overruled."""
    questions(test_data, tmp_path)
    for name in ("train", "dev"):
        document = json.loads((tmp_path / f"{name}.json").read_text())
        for paragraph in document["data"][0]["paragraphs"]:
            for entry in paragraph["qas"][::2]:
                entry |= {"answers": [], "is_impossible": True}
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/debug-bert").symlink_to(pretrained / "runs/debug-bert")
    monkeypatch.chdir(tmp_path)
    tune, score = commands("debug/bert-qa")[-2:]
    tune += ["train.steps=6", "evaluate.every=3", "log.tensorboard=false"]
    assert run(tune) == 3
    assert "task.null_score_diff_threshold=0" in capsys.readouterr().err
    assert run([*tune, "task.null_score_diff_threshold=-1e6"]) == 0
    records = (tmp_path / "runs/debug-bert-qa/metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in records if "dev_f1" in line][-1]
    share = found["dev_f1"]
    assert 0.3 < share < 0.7 and found["dev_no_answer_accuracy"] == 1.0 and found["dev_has_answer_f1"] == 0.0
    for more, accuracy in (([], 1.0), (["task.null_score_diff_threshold=1e6"], 0.0)):
        capsys.readouterr()
        assert run([*score, "--format", "json", *more]) == 0
        document = json.loads(capsys.readouterr().out)
        results = document["results"]["question_answering"]
        assert results["no_answer_accuracy,none"] == pytest.approx(accuracy, abs=0.3)
        assert document["configs"]["question_answering"]["best_f1"] >= results["f1,none"]
    assert results["no_answer_accuracy,none"] < 0.5
    # Of several models each keeps its own threshold, unless one is given by hand, which then counts for all of them.
    models = ["runs/debug-bert-qa", "runs/debug-bert-qa/step-00000006/model"]
    asked = ["evaluate", "--ensemble", *models, "--task", "question_answering", "--data", "dev.json"]
    for more, unanswered in (([], True), (["task.null_score_diff_threshold=1e6"], False)):
        assert run([*asked, "--format", "json", *more]) == 0
        document = json.loads(capsys.readouterr().out)
        assert len(document["results"]) == 3
        for name, values in document["results"].items():
            assert (values["no_answer_accuracy,none"] > 0.7) == unanswered, name
            assert (document["configs"][name]["null_score_diff_threshold"] < 0) == unanswered, name
