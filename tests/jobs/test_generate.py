"""`mlm generate` from prompts to output: formats, order, bad input, dialogue, tensor slicing."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mlm_cli.config.requests import GenerateRequest
from mlm_cli.errors import CheckpointError, DataError, UsageError
from mlm_cli.jobs import generate
from tests.generation.folders import save_folder

TEXTS = ["The quick brown fox jumps over the lazy dog. " * 20, "naïve café — 東京 🙂 " * 40]
QUESTIONS = ["The quick", "naïve", "", "東京 brown", "dog. The lazy", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpt2")
    save_folder(path, "gpt2", TEXTS)
    return path


@pytest.fixture
def questions(tmp_path: Path) -> str:
    path = tmp_path / "questions.jsonl"
    lines = [json.dumps({"prompt": text, "id": f"q{n}", "topic": n}) for n, text in enumerate(QUESTIONS)]
    path.write_text("\n".join(lines))
    return str(path)


def request(folder: Path, **fields: Any) -> GenerateRequest:
    return GenerateRequest(**{"model": str(folder), "max_new_tokens": 20, "temperature": 0.0, **fields})


def test_json_lines_are_what_transformers_generates(folder: Path, questions: str, capsys: Any) -> None:
    assert generate.run(request(folder, prompts_file=questions, format="json", batch_size=3)) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["id"], line["topic"], line["prompt"]) for line in lines] == [
        (f"q{n}", n, text) for n, text in enumerate(QUESTIONS)
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for line in lines:
        ids = tokenizer(line["prompt"] or tokenizer.eos_token, return_tensors="pt").input_ids
        new = model.generate(ids, do_sample=False, max_new_tokens=20, pad_token_id=0)[0, ids.shape[1] :]
        assert line["text"] == tokenizer.decode(new, skip_special_tokens=True)
        assert line["num_prompt_tokens"] == ids.shape[1]
        assert line["num_tokens"] == int((new != 0).sum())
        assert line["finish_reason"] == ("eod" if new[-1] == 0 else "length")


def test_text_of_one_prompt_is_the_answer_alone(folder: Path, capsys: Any) -> None:
    generate.run(request(folder, prompts=("The quick",), format="json"))
    text = json.loads(capsys.readouterr().out)["text"]
    generate.run(request(folder, prompts=("The quick",)))
    shown = capsys.readouterr()
    assert shown.out == text + "\n"
    assert "tokens/s" in shown.err


def test_text_of_several_prompts_names_them(folder: Path, capsys: Any) -> None:
    generate.run(request(folder, prompts=("The", "dog"), max_new_tokens=3))
    out = capsys.readouterr().out
    assert out.startswith("==> 0 <==\n") and "\n\n==> 1 <==\n" in out


def test_standard_input_is_one_prompt(folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"The quick\n")))
    generate.run(request(folder, format="json"))
    assert json.loads(capsys.readouterr().out)["prompt"] == "The quick\n"


def test_standard_input_as_json_lines(folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "a"}\n{"prompt": "b"}\n')))
    generate.run(request(folder, prompts_file="-", format="json"))
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == ["a", "b"]


def test_an_output_file_has_its_name_only_when_complete(
    folder: Path, questions: str, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "deep" / "answers.jsonl"
    generate.run(request(folder, prompts_file=questions, format="json", output=str(out)))
    assert len(out.read_text(encoding="utf-8").splitlines()) == len(QUESTIONS)
    assert capsys.readouterr().out == ""
    with pytest.raises(DataError):
        generate.run(request(folder, prompts=("x " * 500,), output=str(tmp_path / "none.txt")))
    assert not (tmp_path / "none.txt").exists()
    with pytest.raises(UsageError, match="cannot write"):
        generate.run(request(folder, prompts=("a",), output=str(tmp_path)))


def test_the_same_seed_is_the_same_text_in_any_batch(folder: Path, questions: str, capsys: Any) -> None:
    outputs = []
    for batch_size, seed in ((1, 5), (4, 5), (4, 6)):
        fields: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "seed": seed, "batch_size": batch_size}
        generate.run(request(folder, prompts_file=questions, format="json", **fields))
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_a_checkpoint_and_a_run_folder_open_too(folder: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    (run / "step-00000010").mkdir(parents=True)
    (run / "step-00000010" / "model").symlink_to(folder)
    (run / "latest").write_text("step-00000010\n")
    texts = []
    for spec in (folder, run, run / "step-00000010"):
        generate.run(request(spec, prompts=("The quick",)))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]


def test_bad_input_is_told_before_the_weights_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_args: Any, **_options: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(generate, "load_model_folder", never)
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n{"prompt": "fine"}\n{"prompt": \n')
    with pytest.raises(DataError, match=r"prompts.jsonl:3: not JSON"):
        generate.run(request(folder, prompts_file=str(path)))
    path.write_text('{"prompt": "fine"}\n' + json.dumps({"prompt": "x y z " * 100}) + "\n")
    with pytest.raises(DataError, match=r"prompts.jsonl:2: the prompt has \d+ tokens, the model's context holds 96"):
        generate.run(request(folder, prompts_file=str(path)))
    with pytest.raises(UsageError, match="empty stop"):
        generate.run(request(folder, prompts=("a",), stop=("",)))
    with pytest.raises(UsageError, match="2 with 1 ranks"):
        generate.run(request(folder, prompts=("a",), tensor=2))
    with pytest.raises(CheckpointError):
        generate.run(request(tmp_path, prompts=("a",)))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder: Path, test_data: Path) -> None:
    with pytest.raises(CheckpointError, match="50257"):
        generate.run(request(folder, prompts=("a",), tokenizer=str(test_data / "tokenizers" / "gpt2")))


def test_precision_is_that_of_the_files_unless_asked(folder: Path, tmp_path: Path) -> None:
    from mlm_cli.parallel.context import ParallelContext

    half = tmp_path / "half"
    transformers.AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(half)
    single = ParallelContext.single()
    assert generate._load(request(half), half, single).dtype == torch.bfloat16
    assert generate._load(request(folder), folder, single).dtype == torch.float32
    assert generate._load(request(half, precision="fp32"), half, single).dtype == torch.float32


def _on_ranks(rank: int, world_size: int, fields: dict[str, Any]) -> str:
    sys.stdout = io.StringIO()
    generate.run(GenerateRequest(**fields, tensor=world_size))
    return sys.stdout.getvalue()


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 0.9])
def test_two_tensor_slices_give_the_answers_of_one(
    folder: Path, questions: str, run_ranks: Callable[..., list[Any]], capsys: Any, temperature: float
) -> None:
    asked = request(folder, prompts_file=questions, format="json", temperature=temperature, batch_size=4)
    generate.run(asked)
    alone = capsys.readouterr().out
    sliced, silent = run_ranks(_on_ranks, 2, {k: v for k, v in asked.to_dict().items() if k != "tensor"})
    assert sliced == alone and silent == ""


def _failing(rank: int, world_size: int, fields: dict[str, Any]) -> str:
    try:
        return str(generate.run(GenerateRequest(**fields, tensor=world_size)))
    except DataError as error:
        return error.message


def test_ranks_do_not_wait_for_a_rank_0_that_refused_the_input(
    folder: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("nonsense\n")
    said, silent = run_ranks(_failing, 2, {"model": str(folder), "prompts_file": str(path)}, timeout=60)
    assert "prompts.jsonl:1: not JSON" in said and silent == "0"


def talk(folder: Path, lines: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "mlm_cli",
        "generate",
        str(folder),
        "--interactive",
        "--temperature",
        "0",
        *options,
    ]
    return subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120, check=False)


def test_a_dialogue_is_one_growing_text(folder: Path, capsys: Any) -> None:
    """Two turns equal the answer to the whole text so far; what is forgotten is said."""
    done = talk(folder, "The quick\nbrown fox\n", "--format", "json", "--max-new-tokens", "8")
    assert done.returncode == 0, done.stderr
    first, second = [json.loads(line) for line in done.stdout.splitlines()]
    generate.run(request(folder, prompts=("The quick",), format="json", max_new_tokens=8))
    assert json.loads(capsys.readouterr().out)["text"] == first["text"]
    assert second["num_prompt_tokens"] > first["num_prompt_tokens"] + 8
    assert "Ctrl-D leaves" in done.stderr


def test_a_dialogue_outlives_its_context(folder: Path) -> None:
    done = talk(folder, "The quick brown fox\n" * 20 + "x " * 300 + "\nThe\n", "--max-new-tokens", "12")
    assert done.returncode == 0, done.stderr
    assert "oldest" in done.stderr and "say it shorter" in done.stderr
    assert len(done.stdout.splitlines()) >= 21


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_stops_a_reply_and_ctrl_d_leaves(tmp_path: Path, ranks: int) -> None:
    """On a real terminal (a pty): Ctrl-C ends an endless reply, the dialogue goes on, Ctrl-D ends it with 0."""
    import pty

    from tests.generation.folders import save_model, save_tokenizer

    save_tokenizer(tmp_path, TEXTS)
    model = save_model(tmp_path, "gpt2", context=4096)
    model.transformer.wte.weight.data[0] = 0  # the end of the text is never the likeliest token
    model.save_pretrained(tmp_path)
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "mlm_cli", "generate", str(tmp_path), "--interactive", "--temperature", "0"]
    child = subprocess.Popen(
        [*command, "--max-new-tokens", "4000", "--nproc", str(ranks)],
        stdin=follower, stdout=follower, stderr=follower, start_new_session=True, close_fds=True,
    )  # fmt: skip
    os.close(follower)
    seen = b""

    def read() -> bytes:
        ready, _, _ = select.select([leader], [], [], 120)
        assert ready, f"nothing more came after {seen[-300:]!r}"
        return os.read(leader, 256)

    def until(mark: bytes) -> None:
        nonlocal seen
        while mark not in seen:
            seen += read()
        seen = seen[seen.index(mark) + len(mark) :]

    try:
        until(b"> ")
        for _turn in range(2):
            os.write(leader, b"The quick\n")
            until(b"quick\r\n")
            for _ in range(20):
                seen += read()
            os.killpg(child.pid, signal.SIGINT)  # what a terminal does
            until(b"(stopped)")
            until(b"> ")
        os.write(leader, b"\x04")
        assert child.wait(timeout=20) == 0
    finally:
        child.kill()
        os.close(leader)
