"""`mlm generate --serve`: completions over HTTP, in the form of OpenAI's API (platform.openai.com/docs/api-reference).

What its clients send is understood or refused by name; nothing is silently left out.
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from mlm_cli.errors import DataError, MlmError, ResourceError, UsageError
from mlm_cli.generation.encoding import PromptEncoder
from mlm_cli.generation.generator import Answer, EncodedPrompt, Settings
from mlm_cli.generation.prompts import Prompt
from mlm_cli.generation.sampling import Sampling
from mlm_cli.generation.service import Job, Service

_MOST_CHOICES = 128  # of one request
_FINISH = {"eod": "stop", "stop": "stop", "length": "length", "context": "length"}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """Body of ``POST /v1/completions``; ``top_k`` and ``repetition_penalty`` are additions, named as in vLLM."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    n: int = Field(default=1, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    echo: bool = False
    user: str | None = None
    # Known to OpenAI's clients, of use here only as they are when left out.
    best_of: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: dict[str, float] | None = Field(default=None, max_length=0)
    logprobs: None = None
    suffix: None = None


@dataclass(frozen=True)
class Served:
    """A model and how it is asked.

    Attributes:
        settings: what a request does not say.
        longest: tokens that an answer may have at most; None: what the model's context leaves.
        vocab_size: ids below it may stand in a prompt given as tokens.
        context: tokens of a prompt at most.
    """

    name: str
    service: Service
    encoder: PromptEncoder
    settings: Settings
    vocab_size: int
    context: int
    longest: int | None = None


def build_app(served: Served) -> FastAPI:
    """The routes: ``/v1/completions``, ``/v1/models``, ``/health``."""
    app = FastAPI(title="mlm", docs_url=None, redoc_url=None)
    began = int(time.time())
    seeds = random.Random(served.settings.sampling.seed)

    @app.exception_handler(RequestValidationError)
    def _refused(_request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part != "body"]
        return _error(400, f"{'.'.join(where) or 'body'}: {first['msg']}", where[0] if where else None)

    @app.exception_handler(MlmError)
    def _failed(_request: Request, error: MlmError) -> Response:
        message = error.message + (f" ({error.hint})" if error.hint else "")
        return _error(503 if isinstance(error, ResourceError) else 400, message)

    @app.get("/health")
    def _health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    def _models() -> dict[str, Any]:
        model = {"id": served.name, "object": "model", "created": began, "owned_by": "mlm"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/completions")
    async def _completions(body: CompletionRequest, request: Request) -> Response:
        if body.model not in (None, served.name):
            return _error(404, f"the model `{body.model}` is not served here; `{served.name}` is", "model")
        prompts = _prompts(body, served)
        settings = _settings(body, served, seeds.getrandbits(31))
        run = _Run(body, served, settings, prompts)
        run.submit()
        if body.stream:
            return StreamingResponse(run.events(), media_type="text/event-stream")
        return await run.document(request)

    return app


def _error(status: int, message: str, param: str | None = None) -> Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": None}}, status)


def _prompts(body: CompletionRequest, served: Served) -> list[EncodedPrompt]:
    """One for each choice, ``n`` after each other for each prompt.

    Raises:
        DataError, UsageError: a prompt that the model cannot read.
    """
    given = body.prompt
    texts = given if isinstance(given, list) and not (given and isinstance(given[0], int)) else [given]
    if not 0 < len(texts) * body.n <= _MOST_CHOICES:
        raise UsageError(f"{len(texts)} prompts with n={body.n}: a request may have 1 to {_MOST_CHOICES} answers")
    found: list[EncodedPrompt] = []
    for place, text in enumerate(texts):
        where = f"prompt {place}" if len(texts) > 1 else "prompt"
        if isinstance(text, str):
            encoded = served.encoder.encode(Prompt(0, text, None, where))
        else:
            encoded = EncodedPrompt(Prompt(0, "", None, where), _checked_ids(text, where, served))  # type: ignore[arg-type]
        # The number is what chance depends on beside the seed: the same for equal requests.
        found += [replace(encoded, prompt=replace(encoded.prompt, number=place * body.n + i)) for i in range(body.n)]
    if body.echo and any(not isinstance(text, str) for text in texts):
        raise UsageError("echo: a prompt given as tokens has no text to give back")
    return found


def _checked_ids(ids: list[int], where: str, served: Served) -> list[int]:
    if not ids or min(ids) < 0 or max(ids) >= served.vocab_size:
        raise DataError(f"{where}: ids from 0 to {served.vocab_size - 1}, at least one, make a prompt")
    if len(ids) > served.context:
        raise DataError(f"{where}: the prompt has {len(ids)} tokens, the model's context holds {served.context}")
    return ids


def _settings(body: CompletionRequest, served: Served, seed: int) -> Settings:
    """The server's settings with what the request says; without a seed, one of its own."""
    given: dict[str, Any] = {
        "temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k,
        "repetition_penalty": body.repetition_penalty, "seed": seed if body.seed is None else body.seed,
    }  # fmt: skip
    sampling: Sampling = replace(served.settings.sampling, **{k: v for k, v in given.items() if v is not None})
    tokens = served.settings.max_new_tokens if body.max_tokens is None else body.max_tokens
    if served.longest is not None and tokens > served.longest:
        raise UsageError(f"max_tokens: {tokens} is more than the {served.longest} that this server was started with")
    stop = body.stop
    stops = served.settings.stops if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    return replace(served.settings, sampling=sampling, max_new_tokens=tokens, stops=stops)


class _Run:
    """One request: its jobs, and the way back from the thread that answers to the event loop that waits."""

    def __init__(
        self, body: CompletionRequest, served: Served, settings: Settings, prompts: list[EncodedPrompt]
    ) -> None:
        self.body, self.served, self.settings, self.prompts = body, served, settings, prompts
        self.id, self.created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self.jobs: list[Job] = []
        self.news: asyncio.Queue[tuple[int, str | Answer | None]] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()

    def submit(self) -> None:
        try:
            for index, prompt in enumerate(self.prompts):
                told = self._teller(index)
                job = Job(replace(prompt, settings=self.settings), told, told)
                self.served.service.submit(job)
                self.jobs.append(job)
        except ResourceError:
            self.cancel()
            raise

    def _teller(self, index: int) -> Callable[[str | Answer | None], None]:
        def tell(news: str | Answer | None) -> None:
            with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
                self.loop.call_soon_threadsafe(self.news.put_nowait, (index, news))

        return tell

    def cancel(self) -> None:
        for job in self.jobs:
            job.cancelled = True

    async def document(self, request: Request) -> Response:
        """All answers as one document."""
        answers: dict[int, Answer] = {}
        try:
            while len(answers) < len(self.jobs):
                try:
                    index, news = await asyncio.wait_for(self.news.get(), 1.0)
                except TimeoutError:
                    if await request.is_disconnected():
                        return Response(status_code=499)  # nobody reads it
                    continue
                if news is None:
                    return _error(503, "the server is ending")
                if isinstance(news, Answer):
                    answers[index] = news
        finally:
            self.cancel()
        done = [answers[index] for index in range(len(self.jobs))]
        choices = [self._choice(i, self._text(i, answer.text), answer) for i, answer in enumerate(done)]
        return JSONResponse(self._head() | {"choices": choices, "usage": self._usage(done)})

    async def events(self) -> AsyncIterator[str]:
        """Pieces as server-sent events, as they come."""
        answers: list[Answer] = []
        try:
            if self.body.echo:
                for index, prompt in enumerate(self.prompts):
                    yield self._event([self._choice(index, prompt.prompt.text)])
            while len(answers) < len(self.jobs):
                index, news = await self.news.get()
                if news is None:
                    yield _event({"error": {"message": "the server is ending", "type": "server_error"}})
                    return
                if isinstance(news, Answer):
                    answers.append(news)
                    yield self._event([self._choice(index, "", news)])
                else:
                    yield self._event([self._choice(index, news)])
            options = self.body.stream_options
            if options is not None and options.include_usage:
                yield self._event([], usage=self._usage(answers))
            yield "data: [DONE]\n\n"
        finally:
            self.cancel()

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id, "object": "text_completion", "created": self.created, "model": self.served.name,
            "seed": self.settings.sampling.seed,
        }  # fmt: skip

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        return _event(self._head() | {"choices": choices} | more)

    def _text(self, index: int, text: str) -> str:
        return self.prompts[index].prompt.text + text if self.body.echo else text

    def _choice(self, index: int, text: str, answer: Answer | None = None) -> dict[str, Any]:
        reason = None if answer is None else _FINISH[answer.finish_reason]
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    def _usage(self, answers: list[Answer]) -> dict[str, int]:
        # A prompt with several answers is counted once.
        prompts = sum(len(prompt.tokens) for prompt in self.prompts[:: self.body.n])
        new = sum(len(answer.tokens) for answer in answers)
        return {"prompt_tokens": prompts, "completion_tokens": new, "total_tokens": prompts + new}


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"


def open_port(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any that is free.

    Raises:
        UsageError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    door = socket.socket(family)
    try:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind((host, port))
        door.listen(1024)
    except (OSError, OverflowError) as error:
        door.close()
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(f"cannot listen on {host}, port {port}: {reason}", hint="choose another --port") from None
    return door


@contextmanager
def listening(app: FastAPI, door: socket.socket, ended: Callable[[], None]) -> Iterator[None]:
    """Serve ``app`` in a thread beside the body; on the way out, replies under way are finished first.

    Args:
        ended: called when nobody listens any more, whatever the reason.
    """
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)

    def listen() -> None:
        try:
            server.run(sockets=[door])
        finally:
            ended()

    thread = threading.Thread(target=listen, name="http", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        door.close()
