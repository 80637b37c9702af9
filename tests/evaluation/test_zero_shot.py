"""LAMBADA, ranked choices and lm-evaluation-harness: against the harness over transformers, by hand, on two ranks."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file

from mlm_cli.cli.app import run as mlm
from mlm_cli.config.requests import EvaluateRequest
from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.errors import DataError, NumericsError, UsageError
from mlm_cli.evaluation.cloze import read_passages
from mlm_cli.evaluation.likelihood import Likelihood, encode_rows
from mlm_cli.evaluation.ranked_choice import ranked_result, read_questions
from mlm_cli.jobs import evaluate
from tests.generation.folders import save_folder
from tests.ranks import run_ranks

WORDS = ["cat", "dog", "phone", "engineer", "old man", "work", "answer"]
PASSAGES = [f"The {WORDS[n]} saw the {WORDS[n + 2]} and then it was the {WORDS[n + 1]}" for n in range(5)]
CHOICES = ["here", "at work with her", "so"]
QUESTIONS = [
    {"context": f"Question: where is the {word}?\nAnswer:", "choices": CHOICES, "label": number % 3}
    for number, word in enumerate(WORDS)
]


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("gpt2")
    texts = [*PASSAGES, *(f"{question['context']} {' '.join(CHOICES)} " for question in QUESTIONS)]
    return folder, save_folder(folder, "gpt2", texts * 5)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Files of passages and questions, and a folder with tasks of the harness over them."""
    (tmp_path / "lambada.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES))
    (tmp_path / "passages.txt").write_text("\n".join(PASSAGES) + "\n\n")
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    common = "dataset_path: json\ntest_split: test\nmetadata: {version: 3}\n"

    def kwargs(name: str) -> str:
        return f"dataset_kwargs: {{data_files: {{test: {tmp_path / name}}}}}\n"

    (tasks / "cloze.yaml").write_text(
        "task: my_cloze\noutput_type: loglikelihood\n"
        + common
        + kwargs("lambada.jsonl")
        + "doc_to_text: \"{{text.split(' ')[:-1]|join(' ')}}\"\ndoc_to_target: \"{{' '+text.split(' ')[-1]}}\"\n"
        "metric_list:\n- {metric: perplexity, aggregation: perplexity, higher_is_better: false}\n"
        "- {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    (tasks / "quiz.yaml").write_text(
        "task: my_quiz\noutput_type: multiple_choice\n"
        + common
        + kwargs("quiz.jsonl")
        + 'doc_to_text: "{{context}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: label\nfewshot_split: test\n'
        "metric_list:\n- {metric: acc, aggregation: mean, higher_is_better: true}\n"
        "- {metric: acc_norm, aggregation: mean, higher_is_better: true}\n"
    )
    (tasks / "rolling.yaml").write_text(
        "task: my_text\noutput_type: loglikelihood_rolling\n"
        + common
        + kwargs("lambada.jsonl")
        + 'doc_to_text: ""\ndoc_to_target: "{{(text + \' \')*6}}"\n'
        "metric_list:\n- {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}\n"
    )
    (tasks / "write.yaml").write_text(
        "task: my_texts\noutput_type: generate_until\n"
        + common
        + kwargs("quiz.jsonl")
        + 'doc_to_text: "{{context}}"\ndoc_to_target: "{{choices[label]}}"\n'
        "generation_kwargs: {until: ['e'], max_gen_toks: 12, do_sample: false}\n"
        "metric_list:\n- {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    )
    return tmp_path


def scored(request: EvaluateRequest, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert evaluate.run(request) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def by_harness(gpt: tuple[Path, Any], folder: Path, names: list[str], **given: Any) -> dict[str, Any]:
    """The harness over transformers."""
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=gpt[1], tokenizer=transformers.AutoTokenizer.from_pretrained(gpt[0]), batch_size=4)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found: dict[str, Any] = simple_evaluate(
        model=lm, tasks=names, task_manager=manager, bootstrap_iters=0, fewshot_random_seed=1234, **given
    )
    return found


@pytest.mark.parametrize("num_fewshot", [None, 2])
def test_the_harness_scores_as_over_transformers(
    gpt: tuple[Path, Any], data: Path, num_fewshot: int | None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    names = ["my_cloze", "my_quiz", "my_text", "my_texts"] if num_fewshot is None else ["my_quiz"]
    theirs = by_harness(gpt, data / "tasks", names, num_fewshot=num_fewshot)
    request = EvaluateRequest(
        str(gpt[0]), tuple(f"lm_eval:{name}" for name in names), (str(data / "tasks"),), format="json",
        num_fewshot=num_fewshot, output=str(tmp_path / "out"), batch_size=3,
    )  # fmt: skip
    mine = scored(request, capsys)
    for name in names:
        expected = {key: value for key, value in theirs["results"][name].items() if "," in key and "_stderr" not in key}
        assert expected and {key: mine["results"][name][key] for key in expected} == pytest.approx(expected, rel=1e-4)
        assert mine["n-shot"][name] == (num_fewshot or 0) and mine["versions"][name] == 3
        assert mine["n-samples"][name]["effective"] == theirs["n-samples"][name]["effective"]
        samples = [json.loads(line) for line in (tmp_path / "out" / f"samples_{name}.jsonl").read_text().splitlines()]
        for sample, other in zip(samples, theirs["samples"][name], strict=True):
            if name == "my_texts":
                assert sample["resps"] == other["resps"]
            else:
                scores = [float(resp[0][0] if name != "my_text" else resp[0]) for resp in sample["resps"]]
                others = [float(resp[0][0] if name != "my_text" else resp[0]) for resp in other["resps"]]
                assert scores == pytest.approx(others, rel=1e-4)
    assert mine["higher_is_better"][names[0]]["acc"] is True


def test_lambada_and_questions_are_those_of_the_harness(
    gpt: tuple[Path, Any], data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The same numbers without the harness; a plain list of passages and a packed file say the same."""
    theirs = by_harness(gpt, data / "tasks", ["my_cloze", "my_quiz"])["results"]
    packed = data / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress((data / "lambada.jsonl").read_bytes()))
    for name in ("lambada.jsonl", "passages.txt", "packed.jsonl.gz"):
        out = str(tmp_path / "out" / name)
        found = scored(
            EvaluateRequest(str(gpt[0]), ("lambada",), (str(data / name),), output=out, format="json"), capsys
        )
        for metric in ("perplexity,none", "acc,none"):
            assert found["results"]["lambada"][metric] == pytest.approx(theirs["my_cloze"][metric], rel=1e-4)
        assert found["higher_is_better"]["lambada"] == {"perplexity": False, "acc": True}
        lines = [json.loads(line) for line in (tmp_path / "out" / name / "lambada.jsonl").read_text().splitlines()]
        assert [line["target"] for line in lines] == [f" {text.split()[-1]}" for text in PASSAGES]
    request = EvaluateRequest(str(gpt[0]), ("ranked_choice",), (str(data / "quiz.jsonl"),), format="json", limit=5)
    found = scored(request, capsys)
    assert found["n-samples"]["quiz"] == {"original": 7, "effective": 5}
    found = scored(EvaluateRequest(str(gpt[0]), ("ranked_choice",), (str(data / "quiz.jsonl"),), format="json"), capsys)
    for metric in ("acc,none", "acc_norm,none"):
        assert found["results"]["quiz"][metric] == pytest.approx(theirs["my_quiz"][metric])


def test_published_requests(test_data: Path) -> None:
    """OLMES' files: every choice once, the bare ones beside their question, contexts as they are."""
    piqa = read_questions(str(test_data / "eval/olmes/piqa/rc_0shot/requests.jsonl.gz"))
    assert len(piqa) == 400 and {len(question.choices) for question in piqa} == {2}
    assert piqa[1].context == "Goal: dresser\nAnswer:" and piqa[1].label == 1 and piqa[1].task == "piqa"
    assert piqa[1].choices == [" replace drawer with bobby pin ", " finish, woodgrain with  bobby pin "]
    arc = read_questions(str(test_data / "eval/olmes/arc_easy/val_rc_5shot/requests.jsonl.gz"))
    assert len(arc) == 300 and all(question.bare == "Answer:" for question in arc)
    assert sum(len(question.pairs()) for question in arc) == 2402
    assert arc[0].context.count("Question: ") == 6 and arc[0].choices[arc[0].label] == " cellular telephone"
    passages = read_passages(str(test_data / "eval/lambada/lambada_development_plain_text.txt.gz"))
    assert len(passages) == 4869 and passages[0].target == " cake" and passages[0].context.endswith("top of the")


def test_the_four_rules(tmp_path: Path) -> None:
    """Likeliest, a character, a token, over the choice by itself: each rule picks another choice here."""
    row = {"context": "C", "choices": ["aaaa bbbb", "\u00e4\u00f6\u00fc\u00e4\u00f6", "ee", "ffff"], "label": 0}
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (question,) = read_questions(str(path))
    question.bare = ""
    rows = encode_rows(load_tokenizer("bytes"), question.pairs(), ["one"] * 8)
    lengths, sizes = [9, 5, 2, 4], [10, 11, 3, 5]  # characters; bytes, with the space
    assert [row.num_scored for row in rows[:4]] == sizes
    totals = [-6.0, -6.2, -3.0, -5.0]
    bare = [-6.0, -6.2, -3.0, -9.0]
    found = [Likelihood(total, False) for total in (*totals, *bare)]
    expected = {
        "acc": max(range(4), key=lambda n: totals[n]),
        "acc_norm": max(range(4), key=lambda n: totals[n] / lengths[n]),
        "acc_per_token": max(range(4), key=lambda n: totals[n] / sizes[n]),
        "acc_uncond": max(range(4), key=lambda n: totals[n] - bare[n]),
    }
    assert sorted(expected.values()) == [0, 1, 2, 3]
    for label in range(4):
        question.label = label
        result = ranked_result([question], [found], [rows], config={}, num_original=1)
        assert result.metrics == {name: float(best == label) for name, best in expected.items()}


def _result(_rank: int, _size: int, request: EvaluateRequest) -> None:
    evaluate.run(request)


@pytest.mark.parametrize("tensor", [2, 1])
def test_on_two_ranks(gpt: tuple[Path, Any], data: Path, tmp_path: Path, tensor: int) -> None:
    pytest.importorskip("lm_eval")
    found = []
    for ranks, size in ((1, 1), (2, tensor)):
        output, names = tmp_path / f"{ranks}", ("lm_eval:my_cloze", "lm_eval:my_texts")
        request = EvaluateRequest(str(gpt[0]), names, (str(data / "tasks"),), tensor=size, output=str(output))
        if ranks == 1:
            evaluate.run(request)
        else:
            run_ranks(_result, ranks, request)
        texts = (output / "samples_my_texts.jsonl").read_text().splitlines()
        found.append((json.loads((output / "results.json").read_text()), [json.loads(text)["resps"] for text in texts]))
    (one, one_texts), (two, two_texts) = found
    assert one_texts == two_texts and one["results"].keys() == two["results"].keys() == {"my_cloze", "my_texts"}
    for name, entry in one["results"].items():
        for metric, value in entry.items():
            expected = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert two["results"][name][metric] == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no questions"),
        ("{]\n", r"q\.jsonl:1 is not JSON"),
        ("[1]\n", r"q\.jsonl:1 is not a JSON object"),
        ('{"context": "a", "choices": ["b"], "label": 0}\n', r"q\.jsonl:1: a question has two choices or more"),
        ('{"context": "a", "choices": ["b", "c"], "label": 2}\n', r"q\.jsonl:1: label 2 is none of the 2 choices"),
        ('\n{"context": "a", "choices": ["b", "c"], "label": true}\n', r"q\.jsonl:2: not a question"),
        ('{"context": "a", "choices": ["b", " "], "label": 0}\n', r"q\.jsonl:1: not a question"),
        ('{"request": {"context": "a"}, "doc_id": 1, "idx": 0, "label": 0}\n', r"q\.jsonl:1: not a request"),
        ('{"request": {"context": "a", "continuation": " b"}, "doc_id": 1, "idx": 1, "label": 0}\n', "lacks choices"),
        ('{"request": {"context": "a", "continuation": " b"}, "doc_id": 1, "idx": 0, "label": 0}\n' * 2, "there twice"),
    ],
)
def test_bad_questions(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=said):
        read_questions(str(path))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", "\n", "holds no passages"),
        ("p.txt", "two words\nword\n", r"p\.txt:2: a passage has two words"),
        ("p.jsonl", '{"text": "a b"}\n{"txt": "a b"}\n', r"p\.jsonl:2 has no text under the key `text`"),
        ("p.jsonl", "[]\n", r"p\.jsonl:1 has no text under the key `text`"),
    ],
)
def test_bad_passages(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=said):
        read_passages(str(tmp_path / name))


def test_mistakes_of_the_harness(gpt: tuple[Path, Any], data: Path) -> None:
    pytest.importorskip("lm_eval")
    tasks = str(data / "tasks")
    with pytest.raises(UsageError, match="has no task `my_quizz`"):
        evaluate.run(EvaluateRequest(str(gpt[0]), ("lm_eval:my_quizz",), (tasks,)))
    with pytest.raises(UsageError, match="asks one model at a time"):
        evaluate.run(EvaluateRequest(str(gpt[0]), ("lm_eval:my_cloze",), (tasks,), ensemble=(f"{gpt[0]}/.",)))
    with pytest.raises(UsageError, match="tasksy is no folder"):
        evaluate.run(EvaluateRequest(str(gpt[0]), ("lm_eval:my_cloze",), (f"{tasks}y",)))
    write = (data / "tasks" / "write.yaml").read_text()
    (data / "tasks" / "write.yaml").write_text(write.replace("max_gen_toks: 12", "max_gen_toks: 96"))
    with pytest.raises(UsageError, match="answers of 96 tokens leave no room in a context of 96"):
        evaluate.run(EvaluateRequest(str(gpt[0]), ("lm_eval:my_texts",), (tasks,)))
    (data / "tasks" / "write.yaml").write_text(write.replace("choices[label]", "picks[label]"))
    with pytest.raises(DataError, match="cannot run my_texts: UndefinedError: 'picks' is undefined"):
        evaluate.run(EvaluateRequest(str(gpt[0]), ("lm_eval:my_texts",), (tasks,)))
    (data / "quiz.jsonl").unlink()
    with pytest.raises(DataError, match="cannot run my_quiz"):
        evaluate.run(EvaluateRequest(str(gpt[0]), ("lm_eval:my_quiz",), (tasks,)))


def test_two_files_of_one_task_are_not_mixed(gpt: tuple[Path, Any], data: Path, tmp_path: Path) -> None:
    again = tmp_path / "again" / "quiz.jsonl"
    again.parent.mkdir()
    again.write_text((data / "quiz.jsonl").read_text())
    with pytest.raises(UsageError, match=r"again/quiz\.jsonl and .*quiz\.jsonl both hold a task `quiz`"):
        evaluate.run(EvaluateRequest(str(gpt[0]), ("ranked_choice",), (str(data / "quiz.jsonl"), str(again))))


def test_a_long_choice_is_named(gpt: tuple[Path, Any], tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    rows = [{"context": "a", "choices": ["b", choice], "label": 0} for choice in ("c", "why " * 200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"long\.jsonl:2: a continuation of \d+ tokens is longer than the context"):
        evaluate.run(EvaluateRequest(str(gpt[0]), ("ranked_choice",), (str(path),)))


def test_groups_and_several_tasks(gpt: tuple[Path, Any], data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    (data / "tasks" / "group.yaml").write_text("group: my_group\ntask: [my_cloze, my_quiz]\n")
    tasks = ("lm_eval:my_group", "lm_eval:my_text")
    found = scored(EvaluateRequest(str(gpt[0]), tasks, (str(data / "tasks"),), format="json"), capsys)
    assert sorted(found["group_subtasks"]["my_group"]) == ["my_cloze", "my_quiz"]
    assert found["n-samples"]["my_group"]["effective"] == 5 + 7 and found["n-samples"]["my_text"]["effective"] == 5
    few = EvaluateRequest(str(gpt[0]), ("lm_eval:my_quiz",), (str(data / "tasks"),), num_fewshot=9)
    with pytest.raises(DataError, match="cannot run my_quiz") as error:
        evaluate.run(few)
    assert error.value.hint == "evaluate.num_fewshot asks for more examples than there are"


def _fails(_rank: int, _size: int, request: EvaluateRequest) -> str:
    with pytest.raises(NumericsError) as error:
        evaluate.run(request)
    return str(error.value)


@pytest.mark.parametrize("tensor", [2, 1])
def test_a_model_without_numbers_fails_on_all_ranks(
    gpt: tuple[Path, Any], data: Path, tmp_path: Path, tensor: int
) -> None:
    """One text on two data ranks: the other has none, and must not wait for it."""
    pytest.importorskip("lm_eval")
    shutil.copytree(gpt[0], tmp_path / "broken")
    weights = load_file(tmp_path / "broken/model.safetensors")
    weights["transformer.ln_f.weight"].fill_(float("nan"))
    save_file(weights, tmp_path / "broken/model.safetensors", metadata={"format": "pt"})
    request = EvaluateRequest(
        str(tmp_path / "broken"), ("lm_eval:my_texts",), (str(data / "tasks"),), tensor=tensor, limit=1
    )
    assert all("not finite" in said for said in run_ranks(_fails, 2, request, timeout=100.0))


def test_a_failing_model_is_no_fault_of_the_task(
    gpt: tuple[Path, Any], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = pytest.importorskip("mlm_cli.evaluation.harness")

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(harness, "score_rows", broken)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        evaluate.run(EvaluateRequest(str(gpt[0]), ("lm_eval:my_quiz",), (str(data / "tasks"),)))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--task", "lambada"], "lambada needs its passages"),
        (["--task", "ranked_choices"], "did you mean `ranked_choice`"),
        (["--task", "lm_eval:"], "unknown task `lm_eval:`"),
        (["--task", "lm_eval:x", "--task", "lambada", "--data", "x"], "--data cannot be for both lm_eval:x"),
        (["--task", "lambada", "--data", "x", "evaluate.num_fewshot=2"], "evaluate.num_fewshot is for lm_eval:NAME"),
        (["--task", "crows_pairs", "--data", "x", "evaluate.max_length=9"], "max_length is not for crows_pairs"),
    ],
)
def test_the_command_refuses(
    gpt: tuple[Path, Any], words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mlm(["evaluate", str(gpt[0]), *words]) == 2
    assert said in capsys.readouterr().err.replace("\n", " ")


def test_a_masked_model_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="masked language model"):
        evaluate.run(EvaluateRequest(str(tmp_path), ("lambada",), ("x",)))
