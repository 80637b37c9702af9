"""`mlm generate --serve` as its clients see it: a real process, asked over HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import transformers

from mlm_cli.cli.app import run
from mlm_cli.config.requests import GenerateRequest
from mlm_cli.jobs import generate
from tests.generation.folders import save_folder

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

TEXTS = ["The quick brown fox jumps over the lazy dog. " * 20, "naïve café — 東京 🙂 " * 40]
ASKED = ["The quick", "naïve", "", "東京 brown", "dog. The lazy", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "gpt2"
    path.mkdir()
    save_folder(path, "gpt2", TEXTS)
    return path


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    yield
    for process in _STARTED:
        process.kill()
        process.wait()


_STARTED: list[subprocess.Popen[str]] = []


class Server:
    """A running `mlm generate --serve`."""

    def __init__(self, folder: Path, *options: str) -> None:
        command = [sys.executable, "-m", "mlm_cli", "generate", str(folder), "--serve", "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--max-new-tokens", "20", *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ},
        )  # fmt: skip
        _STARTED.append(self.process)
        assert self.process.stderr is not None
        said = ""
        while not (found := re.search(r"answers POST (http://[^/]+)/v1/completions", said)):
            line = self.process.stderr.readline()
            assert line, said
            said += line
        self.address = found.group(1)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{self.address}\n"  # as any free port was asked for

    def open(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=60)

    def ask(self, **body: Any) -> Any:
        with self.open("/v1/completions", {"temperature": 0, **body}) as reply:
            return json.loads(reply.read())

    def refusal(self, path: str = "/v1/completions", **body: Any) -> tuple[int, str, str | None]:
        with pytest.raises(urllib.error.HTTPError) as caught:
            self.open(path, body)
        error = json.loads(caught.value.read())["error"]
        return caught.value.code, error["message"], error["param"]

    def events(self, **body: Any) -> list[Any]:
        with self.open("/v1/completions", {"temperature": 0, "stream": True, **body}) as reply:
            assert reply.headers["Content-Type"].startswith("text/event-stream")
            blocks = reply.read().decode().split("\n\n")
        assert blocks[-2:] == ["data: [DONE]", ""]
        return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        code = self.process.wait(timeout=60)
        assert self.process.stderr is not None
        self.last_words = self.process.stderr.read()
        self.process.stderr.close()
        assert self.process.stdout is not None and self.process.stdout.read() == ""
        self.process.stdout.close()
        return code


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    made = Server(folder, "--batch-size", "3")
    yield made
    assert made.end(signal.SIGINT) == 0
    assert "Traceback" not in made.last_words


def test_many_at_once_get_what_one_gets(server: Server, folder: Path, capsys: Any) -> None:
    """Six askers, three rows: each answer is that of `mlm generate`, and of transformers."""
    request = GenerateRequest(
        str(folder), prompts=tuple(ASKED), temperature=0.0, max_new_tokens=20, format="json", batch_size=1
    )
    generate.run(request)
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda text: server.ask(prompt=text, model="gpt2"), ASKED))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for text, reply, line in zip(ASKED, replies, expected, strict=True):
        choice, usage = reply["choices"][0], reply["usage"]
        assert choice["text"] == line["text"] and choice["index"] == 0
        assert choice["finish_reason"] == {"eod": "stop", "length": "length"}[line["finish_reason"]]
        assert usage["prompt_tokens"] == line["num_prompt_tokens"] and usage["completion_tokens"] == line["num_tokens"]
        assert (reply["object"], reply["model"]) == ("text_completion", "gpt2")
        ids = tokenizer(text or tokenizer.eos_token, return_tensors="pt").input_ids
        new = model.generate(ids, do_sample=False, max_new_tokens=20, pad_token_id=0)[0, ids.shape[1] :]
        assert choice["text"] == tokenizer.decode(new, skip_special_tokens=True)
        assert server.ask(prompt=ids[0].tolist())["choices"][0]["text"] == choice["text"]


def test_a_stream_is_the_answer_in_pieces(server: Server) -> None:
    whole = server.ask(prompt="The quick")
    events = server.events(prompt="The quick", stream_options={"include_usage": True})
    pieces = [choice for event in events for choice in event["choices"]]
    assert len(pieces) > 5 and "".join(piece["text"] for piece in pieces) == whole["choices"][0]["text"]
    assert [piece["finish_reason"] for piece in pieces[-2:]] == [None, whole["choices"][0]["finish_reason"]]
    assert events[-1]["usage"] == whole["usage"] and events[-1]["choices"] == []
    assert len({event["id"] for event in events}) == 1
    echoed = server.events(prompt="The quick", echo=True)
    assert "".join(c["text"] for e in echoed for c in e["choices"]) == "The quick" + whole["choices"][0]["text"]


def test_several_prompts_and_answers(server: Server) -> None:
    body = {"prompt": ["The quick", "dog"], "n": 3, "temperature": 1.0, "max_tokens": 8}
    first = server.ask(**body, seed=7)
    texts = [choice["text"] for choice in first["choices"]]
    assert [choice["index"] for choice in first["choices"]] == list(range(6)) and len(set(texts)) == 6
    assert server.ask(**body, seed=7)["choices"] == first["choices"] and first["seed"] == 7
    # Without a seed each request has its own, which is told and gives the same again.
    free, other = server.ask(**body), server.ask(**body)
    assert free["choices"] != other["choices"]
    assert server.ask(**body, seed=free["seed"])["choices"] == free["choices"]
    prompts = sum(server.ask(prompt=text)["usage"]["prompt_tokens"] for text in body["prompt"])
    assert first["usage"]["prompt_tokens"] == prompts
    assert server.ask(prompt="dog", echo=True)["choices"][0]["text"].startswith("dog")


def test_stop_strings_and_lengths(server: Server) -> None:
    whole = server.ask(prompt="The quick")["choices"][0]["text"]
    stop = whole[len(whole) // 2 :][:3]
    choice = server.ask(prompt="The quick", stop=stop)["choices"][0]
    assert choice == {
        "index": 0, "text": whole[: whole.index(stop)], "logprobs": None, "finish_reason": "stop",
    }  # fmt: skip
    assert server.ask(prompt="The quick", max_tokens=3)["usage"]["completion_tokens"] == 3


def test_what_cannot_be_done_is_refused_by_name(server: Server) -> None:
    for body, status, message, param in (
        ({"prompt": "x", "max_token": 5}, 400, "Extra inputs are not permitted", "max_token"),
        ({}, 400, "Field required", "prompt"),
        ({"prompt": ["x", 1]}, 400, "a text, a list of texts, the ids of one prompt", "prompt"),
        ({"prompt": [True]}, 400, "a text, a list of texts, the ids of one prompt", "prompt"),
        ({"prompt": "\ud800"}, 400, "half of a surrogate pair", "prompt"),
        ({"prompt": "x", "model": "\ud800"}, 400, "half of a surrogate pair", "model"),
        ({"prompt": "x", "seed": "7"}, 400, "valid integer", "seed"),
        ({"prompt": "x", "logprobs": 3}, 400, "is not supported", "logprobs"),
        ({"prompt": "x", "suffix": "y"}, 400, "is not supported", "suffix"),
        ({"prompt": "x", "stream_options": {}}, 400, "only where `stream` is true", "stream_options"),
        ({"prompt": "x", "temperature": -1}, 400, "temperature -1.0 is neither 0 nor", None),
        ({"prompt": "x", "temperature": 1e-40}, 400, "is neither 0 nor 1e-6 or more", None),
        ({"prompt": "x", "repetition_penalty": 1e-45}, 400, "is not between", None),
        ({"prompt": "x", "max_tokens": 0}, 400, "greater than or equal to 1", "max_tokens"),
        ({"prompt": "x", "stop": ""}, 400, "empty stop", None),
        ({"prompt": "x " * 200}, 400, "the model's context holds 96", None),
        ({"prompt": "x" * 100_000}, 400, "100000 characters, and the model's context holds 96 tokens", None),
        ({"prompt": "x", "user": "x" * (17 << 20)}, 413, "more than 16 MiB", None),
        ({"prompt": [[1, 2], [400]]}, 400, "prompt 1: ids from 0 to 399", None),
        ({"prompt": []}, 400, "0 prompts", None),
        ({"prompt": "x", "n": 500}, 400, "1 to 128 answers", None),
        ({"prompt": "x", "model": "gpt3"}, 404, "`gpt2` is", "model"),
    ):
        found = server.refusal(**body)
        assert found[0] == status and message in found[1] and found[2] == param, found
    for path, status in (("/v1/chat/completions", 404), ("/v1/models", 405), ("/v1/completions/", 404)):
        code, message, _ = server.refusal(path, prompt="x")
        assert code == status and "POST /v1/completions" in message
    for body in (b"{", b"\xff", b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}", b"[]"):
        request = urllib.request.Request(f"{server.address}/v1/completions", body)  # without a content type
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=60)
        error = json.loads(caught.value.read())["error"]
        assert caught.value.code == 400 and error["message"].startswith("the body is") and error["param"] is None
    nothing = dict.fromkeys(("n", "stream", "echo", "logprobs", "stop", "seed", "max_tokens", "model"))
    quiet = {**nothing, "suffix": "", "frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "best_of": 1}
    assert server.ask(prompt="x", **quiet)["choices"] == server.ask(prompt="x")["choices"]
    with server.open("/v1/models") as reply:
        assert [model["id"] for model in json.loads(reply.read())["data"]] == ["gpt2"]
    with server.open("/health") as reply:
        assert json.loads(reply.read()) == {"status": "ok"}


def test_who_hangs_up_frees_the_row(server: Server) -> None:
    """Long answers fill rows and queue; their askers go, streaming or not; who comes next does not wait long."""
    host, port = server.address.removeprefix("http://").split(":")
    for stream in (True, False):
        asked = {"prompt": "The", "stream": stream, "max_tokens": 90, "n": 128, "temperature": 0, "stop": "no such"}
        body = json.dumps(asked).encode()
        doors = [socket.create_connection((host, int(port)), timeout=30) for _ in range(8)]
        for door in doors:
            door.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        if stream:
            assert all(b"200 OK" in door.recv(64) for door in doors)
        else:
            time.sleep(1.0)
        for door in doors:
            door.close()
        begin = time.monotonic()
        for _ in range(200):  # until the server has noticed
            try:
                assert server.ask(prompt="The quick", max_tokens=4)["usage"]["completion_tokens"] == 4
                break
            except urllib.error.HTTPError as error:
                assert error.code == 503
                time.sleep(0.05)
        # 8 x 128 answers of 90 tokens would have taken minutes.
        assert time.monotonic() - begin < 15


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_ranks_serve_and_end_together(folder: Path, number: signal.Signals, server: Server) -> None:
    sliced = Server(folder, "--nproc", "2")
    assert sliced.ask(prompt="The quick")["choices"] == server.ask(prompt="The quick")["choices"]
    assert sliced.end(number) == 0, sliced.last_words
    assert "Traceback" not in sliced.last_words and "error" not in sliced.last_words


@pytest.mark.slow
def test_a_rank_that_dies_takes_the_server_down(folder: Path) -> None:
    sliced = Server(folder, "--nproc", "2")
    children = Path(f"/proc/{sliced.process.pid}/task/{sliced.process.pid}/children").read_text().split()
    ranks = [number for number in children if b"RANK=1" in Path(f"/proc/{number}/environ").read_bytes().split(b"\0")]
    os.kill(int(ranks[0]), signal.SIGKILL)
    assert sliced.process.wait(timeout=30) == 6
    assert sliced.process.stderr is not None and "rank 1 of 2 was lost" in sliced.process.stderr.read()


def test_a_port_in_use_is_told_before_the_weights_are_read(folder: Path, capsys: Any) -> None:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        door.listen()
        port = str(door.getsockname()[1])
        assert run(["generate", str(folder), "--serve", "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in capsys.readouterr().err
    assert run(["generate", str(folder), "--serve", "--host", "192.0.2.1"]) == 2
    assert "check --host" in capsys.readouterr().err
    assert run(["generate", str(folder), "--prompt", "x", "--port", "1"]) == 2
    assert "`--port` is for `--serve`" in capsys.readouterr().err
    assert run(["generate", str(folder), "--serve", "--format", "json"]) == 2
    assert "answers in JSON whatever" in capsys.readouterr().err
    assert run(["generate", str(folder), "--serve", "--prompt", "x"]) == 2
    assert "`--prompt` and `--serve` exclude each other" in capsys.readouterr().err
    assert run(["generate", str(folder), "--serve", "--output", "x.txt"]) == 2
    assert "`--serve` and `--output` exclude each other" in capsys.readouterr().err


def test_a_server_marks_its_answers_and_says_what_wrote_them(
    folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARK", "1234577291")
    keys = ["generate.watermark_bias=5", "generate.watermark_key=env:MARK", "generate.provenance=true"]
    made = Server(folder, *keys)
    marked, mark = made.ask(prompt="The quick"), {"scheme": "lefthash", "context": 1, "ratio": 0.25, "bias": 5.0}
    assert marked["provenance"]["watermark"] == mark and marked["provenance"]["model"] == "gpt2"
    assert marked["provenance"]["temperature"] == 0.0
    events = made.events(prompt="The quick", temperature=0.5, seed=3)
    assert [event.get("provenance", {}).get("seed") for event in events] == [None] * (len(events) - 1) + [3]
    assert made.refusal(prompt="x", top_k=1)[:2] == (400, "top-k 1 leaves a watermark nothing to choose from")
    assert made.end(signal.SIGINT) == 0 and "1234577291" not in made.last_words
    words = ["generate", str(folder), "--prompt", "The quick", "--temperature", "0", "--max-new-tokens", "20"]
    for given in (keys, []):
        assert run([*words, "--format", "json", *given]) == 0
        same = json.loads(capsys.readouterr().out)["text"] == marked["choices"][0]["text"]
        assert same == bool(given)
