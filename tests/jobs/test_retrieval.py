"""`mlm generate` with a knowledge base and `mlm evaluate --task retrieval`, from files to output."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlm_cli.cli.app import run
from mlm_cli.config.requests import GenerateRequest
from mlm_cli.config.retrieval_section import RetrievalSection
from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.errors import DataError, UsageError
from mlm_cli.generation.decoder import Decoder
from mlm_cli.jobs import generate
from tests.generation.folders import save_folder
from tests.generation.test_dense import save as save_embedding
from tests.generation.test_encoder_decoder import make_t5, save_tokenizer
from tests.jobs.test_serve import Server

pytest.importorskip("bm25s")

TEXTS = ["The quick brown fox jumps over the lazy dog. " * 20, "naïve café — 東京 " * 40]
FACTS = ["A lazy dog sleeps over the café.", "The fox jumps.", "東京 is a quick naïve city."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpt2")
    save_folder(path, "gpt2", TEXTS)
    return path


@pytest.fixture
def facts(tmp_path: Path) -> str:
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in FACTS))
    return str(path)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids that the model reads, prompt by prompt."""
    seen, real = list[list[int]](), Decoder.add

    def add(decoder: Decoder, tokens: Sequence[int]) -> Any:
        seen.append(list(tokens))
        return real(decoder, tokens)

    monkeypatch.setattr(Decoder, "add", add)
    return seen


def request(folder: Path, facts: str, **fields: Any) -> GenerateRequest:
    section = RetrievalSection(documents=(facts,), **fields.pop("retrieval", {}))
    settings = {"max_new_tokens": 8, "temperature": 0.0, "format": "json", **fields}
    return GenerateRequest(model=str(folder), retrieval=section, **settings)


def test_an_answer_says_which_passages_it_was_made_of(
    folder: Path, facts: str, given: list[list[int]], capsys: Any
) -> None:
    template = "{passages} | {prompt} ="
    generate.run(request(folder, facts, prompts=("lazy dog?", "zebra"), retrieval={"template": template}))
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    tokenizer = load_tokenizer(str(folder))
    assert given == [tokenizer.encode(f"{FACTS[0]} | lazy dog? ="), tokenizer.encode("| zebra =")]
    assert (first["prompt"], first["num_prompt_tokens"]) == ("lazy dog?", len(given[0]))
    [passage] = first["passages"]
    assert passage["score"] > 0 and passage["text"] == FACTS[0]
    assert (passage["source"], passage["offset"], first["num_passages_dropped"]) == (f"{facts}:1", 0, 0)
    assert (second["passages"], second["num_passages_dropped"]) == ([], 0)
    asked = replace(request(folder, facts, prompts=(f"{FACTS[0]} | lazy dog? =",)), retrieval=None)
    generate.run(asked)
    plain = json.loads(capsys.readouterr().out)
    assert plain["text"] == first["text"] and "passages" not in plain


def test_passages_without_room_are_left_out_and_told(
    folder: Path, facts: str, tmp_path: Path, given: list[list[int]], capsys: Any
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "fox"}\n{"prompt": "the quick dog fox"}\n')
    generate.run(request(folder, facts, prompts_file=str(prompts), max_new_tokens=60))
    shown = capsys.readouterr()
    lines = [json.loads(line) for line in shown.out.splitlines()]
    assert lines[0]["num_passages_dropped"] == 0 < lines[1]["num_passages_dropped"]
    assert "1 of 2 prompts left no room in the model's context for all their passages" in shown.err
    kept = [passage["text"] for passage in lines[1]["passages"]]
    assert given[1] == load_tokenizer(str(folder)).encode("\n\n".join([*kept, "the quick dog fox"]))
    assert len(given[1]) <= 96 - 60
    assert all(line["num_tokens"] == 60 or line["finish_reason"] == "eod" for line in lines)


def test_text_is_the_answer_and_the_sources_are_talk(folder: Path, facts: str, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Tokyo? A naive city?")))
    generate.run(request(folder, facts, format="text"))
    shown = capsys.readouterr()
    assert f"0: passages {facts}:3 (" in shown.err and facts not in shown.out


def test_t5_reads_passages_and_keeps_its_answer_apart(
    tmp_path: Path, facts: str, given: list[list[int]], capsys: Any
) -> None:
    make_t5(tmp_path / "t5", "v1.0")
    save_tokenizer(tmp_path / "t5", TEXTS)
    generate.run(request(tmp_path / "t5", facts, prompts=("fox",), max_new_tokens=120))
    answer = json.loads(capsys.readouterr().out)
    tokenizer = load_tokenizer(str(tmp_path / "t5"))
    assert given == [[*tokenizer.encode(f"{FACTS[1]}\n\nfox"), tokenizer.eod_id]]
    assert answer["num_passages_dropped"] == 0


def _on_ranks(rank: int, world_size: int, asked: GenerateRequest) -> str:
    sys.stdout = io.StringIO()
    generate.run(asked)
    return sys.stdout.getvalue()


def test_slices_answer_as_one(folder: Path, facts: str, run_ranks: Callable[..., list[Any]], capsys: Any) -> None:
    generate.run(request(folder, facts, prompts=("lazy dog?", "fox")))
    alone = capsys.readouterr().out
    sliced, silent = run_ranks(_on_ranks, 2, request(folder, facts, prompts=("lazy dog?", "fox"), tensor=2))
    assert sliced == alone and silent == ""


def test_what_cannot_be_asked_is_refused_before_the_weights_are_read(
    folder: Path, facts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "load_model_folder", lambda *_args, **_options: pytest.fail("weights were read"))
    with pytest.raises(UsageError, match="`--interactive` is one text that grows"):
        generate.run(request(folder, facts, interactive=True))
    prompts = tmp_path / "prompts.jsonl"
    for bad, message in ((" ", "an empty prompt"), ("x y z " * 100, r"the prompt has \d+ tokens")):
        prompts.write_text('{"prompt": "fox"}\n' + json.dumps({"prompt": bad}) + "\n")
        with pytest.raises(DataError, match=f"prompts.jsonl:2: {message}"):
            generate.run(request(folder, facts, prompts_file=str(prompts)))
    with pytest.raises(DataError, match="--prompt number 2: an empty prompt"):
        generate.run(request(folder, facts, prompts=("fox", " ")))
    Path(facts).write_text('{"text": "x"}\n{"text"\n')
    with pytest.raises(DataError, match=r"facts.jsonl:2: malformed JSON"):
        generate.run(request(folder, facts, prompts=("fox",)))


def test_a_dry_run_shows_the_settings(folder: Path, facts: str, capsys: Any) -> None:
    command = ["generate", str(folder), "--prompt", "x", "--dry-run", f"retrieval.documents={facts}"]
    assert run([*command, "--format", "json"]) == 0
    asked = json.loads(capsys.readouterr().out)["request"]["retrieval"]
    assert (asked["documents"], asked["retriever"], asked["num_passages"]) == ([facts], "bm25", 3)
    assert run(command) == 0
    assert "passage_words" in capsys.readouterr().out
    assert run([*command[:-1], "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["request"]["retrieval"] is None


def squad(path: Path, paragraphs: list[tuple[str, list[tuple[str, str | None]]]]) -> str:
    """A file in SQuAD's form of (context, [(question, answer)])."""
    entries = []
    for number, (context, pairs) in enumerate(paragraphs):
        qas = [
            {
                "id": f"{number}-{place}",
                "question": question,
                "answers": [] if answer is None else [{"text": answer, "answer_start": context.index(answer)}],
            }
            for place, (question, answer) in enumerate(pairs)
        ]
        entries.append({"context": context, "qas": qas})
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": entries}]}))
    return str(path)


def test_retrieval_is_scored_by_the_rank_of_the_answer(tmp_path: Path, capsys: Any) -> None:
    """Ranks that can be seen by eye, with passages of four words."""
    path = squad(
        tmp_path / "q.json",
        [
            ("red apples grow here green pears grow there", [("green pears?", "pears"), ("red?", "here green")]),
            (
                "blue plums ripen late blue plums",
                [("late plums?", "late"), ("blue plums?", "blue plums"), ("no?", None)],
            ),
            ("red red wine ages", [("red?", "ages"), ("whiskey?", "wine")]),
        ],
    )
    command = ["evaluate", "--task", "retrieval", "--data", path, "--format", "json", "-o", str(tmp_path / "out")]
    assert run([*command, "retrieval.passage_words=4"]) == 0
    document = json.loads(capsys.readouterr().out)
    records = [json.loads(line) for line in (tmp_path / "out" / "retrieval.jsonl").read_text().splitlines()]
    # "here green" is cut in two, "whiskey" is nowhere; the right "blue plums" are not those of the shorter passage.
    assert {one["id"]: one["rank"] for one in records} == {
        "0-0": 1, "0-1": None, "1-0": 1, "1-1": 2, "2-0": 1, "2-1": None,
    }  # fmt: skip
    scores, config = document["results"]["retrieval"], document["configs"]["retrieval"]
    assert [scores[f"{name},none"] for name in ("recall@1", "recall@5", "recall@10", "mrr")] == pytest.approx(
        [3 / 6, 4 / 6, 4 / 6, 3.5 / 6]
    )
    assert (config["num_passages"], config["num_texts"], config["num_unanswerable"]) == (5, 3, 1)
    assert document["model_name"] == "bm25"
    assert run([*command, "retrieval.passage_words=100", "--limit", "2"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["n-samples"]["retrieval"] == {"original": 6, "effective": 2}
    scores = document["results"]["retrieval"]
    assert (scores["recall@1,none"], scores["recall@5,none"], scores["mrr,none"]) == (0.5, 1.0, 0.75)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "retrieval needs questions on texts"),
        (["--data", "FILE", "--task", "perplexity"], 2, "retrieval is scored by itself"),
        (["--data", "FILE", "retrieval.documents=x"], 2, "`retrieval.documents` is not for --task retrieval"),
        (["--data", "FILE", "retrieval.passage_overlap=200"], 2, "leaves nothing new"),
        (["nowhere/at/all", "--data", "FILE"], 4, "nowhere/at/all"),
        (["FILE"], 2, "is a file, and no model"),
    ],
)
def test_retrieval_with_what_it_cannot_have(
    tmp_path: Path, capsys: Any, arguments: list[str], code: int, message: str
) -> None:
    path = squad(tmp_path / "q.json", [("a b", [("a?", "b")])])
    given = [path if word == "FILE" else word for word in arguments]
    assert run(["evaluate", *given, "--task", "retrieval"]) == code
    assert message in capsys.readouterr().err


def test_a_model_is_scored_by_its_embeddings(tmp_path: Path, capsys: Any) -> None:
    model = save_embedding(tmp_path / "m", "bert")
    path = squad(tmp_path / "q.json", [("a film was good", [("a film was good", "film")]), ("bad", [("bad", "bad")])])
    assert run(["evaluate", str(model), "--task", "retrieval", "--data", path, "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["model_name"] == str(model)
    assert document["configs"]["retrieval"]["retriever"] == "dense"
    assert document["results"]["retrieval"]["recall@1,none"] == 1.0  # each question is its own text
    assert run(["evaluate", str(model), "--task", "retrieval", "--data", path, "retrieval.retriever=dense",
                f"retrieval.embedding_model={model}"]) == 2  # fmt: skip
    assert "are two models" in capsys.readouterr().err


def test_a_server_looks_up_each_request(folder: Path, facts: str) -> None:
    pytest.importorskip("uvicorn")
    server = Server(folder, f"retrieval.documents={facts}", "retrieval.num_passages=2")
    try:
        reply = server.ask(prompt=["lazy dog?", "zebra"], max_tokens=5)
        first, second = reply["choices"]
        assert (first["passages"][0]["source"], second["passages"]) == (f"{facts}:1", [])
        assert first["num_passages_dropped"] == 0
        [crowded] = server.ask(prompt="lazy dog?", max_tokens=90)["choices"]  # no room beside so long an answer
        assert (crowded["passages"], crowded["num_passages_dropped"]) == ([], 1)
        last = server.events(prompt="lazy dog?", max_tokens=2)[-1]["choices"][0]
        assert last["passages"] == first["passages"]
        status, message, _ = server.refusal(prompt=[1, 2, 3])
        assert status == 400 and "given as ids" in message
        status, message, _ = server.refusal(prompt="")
        assert status == 400 and "nothing to look up" in message
        assert server.end(signal.SIGTERM) == 0
    finally:
        server.process.kill()


def test_xquad_is_found_as_documented(test_data: Path, capsys: Any) -> None:
    """docs/knowledge-bases.md: BM25 among the paragraphs of XQuAD's first part."""
    path = test_data / "finetune" / "xquad" / "xquad.en.part-a.json"
    command = ["evaluate", "--task", "retrieval", "--data", str(path), "--format", "json"]
    assert run([*command, "retrieval.passage_words=1000"]) == 0
    scores = json.loads(capsys.readouterr().out)["results"]["retrieval"]
    assert [round(scores[f"{name},none"], 3) for name in ("recall@1", "recall@5", "mrr")] == [0.924, 0.986, 0.951]
