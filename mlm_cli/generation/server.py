"""`mlm generate --serve`: completions over HTTP. What is asked is in ``completions``, who answers in ``service``."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import random
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from mlm_cli.errors import MlmError, ResourceError, UsageError
from mlm_cli.generation import completions
from mlm_cli.generation.answer import NOT_NUMBERS, Answer, EncodedPrompt, Settings
from mlm_cli.generation.completions import Asked, CompletionRequest, Refusal
from mlm_cli.generation.provenance import Provenance
from mlm_cli.generation.service import Job, Service

_FINISH = {"eod": "stop", "stop": "stop", "length": "length", "context": "length"}
_ENDING = "the server is ending"


@dataclass(frozen=True)
class Served:
    """A model under its name: who answers, how it is asked, and what replies say of it (None: the name alone)."""

    name: str
    service: Service
    asked: Asked
    provenance: Provenance | None = None


def build_app(served: Served) -> FastAPI:
    """The routes: ``/v1/completions``, ``/v1/models``, ``/health``."""
    app = FastAPI(title="mlm", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    began = int(time.time())
    seeds = random.Random(served.asked.settings.sampling.seed)

    @app.exception_handler(HTTPException)
    async def _no_route(request: Request, error: HTTPException) -> Response:
        there = "; POST /v1/completions, GET /v1/models and /health are there"
        return _error(error.status_code, f"{request.method} {request.url.path}: {error.detail}{there}")

    @app.exception_handler(MlmError)
    async def _failed(_request: Request, error: MlmError) -> Response:
        if isinstance(error, Refusal):
            return _error(error.status, error.message, error.field)
        return _error(503 if isinstance(error, ResourceError) else 400, error.message)

    @app.exception_handler(Exception)
    async def _bug(_request: Request, error: Exception) -> Response:
        return _error(500, f"{type(error).__name__}: {error}")

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def _health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/v1/models")
    async def _models() -> Response:
        model = {"id": served.name, "object": "model", "created": began, "owned_by": "mlm"}
        return JSONResponse({"object": "list", "data": [model]})

    @app.post("/v1/completions")
    async def _completions(request: Request) -> Response:
        body = completions.parse(await _read(request))
        if body.model not in (None, served.name):
            raise Refusal(404, f"the model `{body.model}` is not served here; `{served.name}` is", "model")
        settings = completions.settings_of(body, served.asked, seeds.getrandbits(31))
        # Long texts take their time, in which others are to be answered.
        prompts = await asyncio.to_thread(completions.prompts_of, body, served.asked)
        run = _Run(body, served, settings, prompts)
        served.service.submit(run.jobs)
        if body.stream:
            return StreamingResponse(run.events(), media_type="text/event-stream")
        return await run.document(request)

    return app


async def _read(request: Request) -> bytes:
    """The body. Raises Refusal: it is too long."""
    parts, size = list[bytes](), 0
    async for part in request.stream():
        size += len(part)
        if size <= completions.MOST_BYTES:  # the rest is read and dropped: clients look for a reply only behind it
            parts.append(part)
    if size > completions.MOST_BYTES:
        raise Refusal(413, f"the body has more than {completions.MOST_BYTES >> 20} MiB")
    return b"".join(parts)


def _error(status: int, message: str, field: str | None = None) -> Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": field, "code": None}}, status)


class _Run:
    """One request: its jobs, and the way back from the thread that answers to the event loop that waits."""

    def __init__(
        self, body: CompletionRequest, served: Served, settings: Settings, prompts: list[EncodedPrompt]
    ) -> None:
        self.body, self.served, self.settings, self.prompts = body, served, settings, prompts
        self.id, self.created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self.news: asyncio.Queue[tuple[int, str | Answer | None]] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.jobs = [self._job(index, prompt) for index, prompt in enumerate(prompts)]

    def _job(self, index: int, prompt: EncodedPrompt) -> Job:
        def tell(news: str | Answer | None) -> None:
            with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
                self.loop.call_soon_threadsafe(self.news.put_nowait, (index, news))

        on_piece = tell if self.body.stream else lambda _piece: None
        return Job(replace(prompt, settings=self.settings), on_piece, tell)

    async def document(self, request: Request) -> Response:
        """All answers as one document."""
        gone = asyncio.ensure_future(_hangs_up(request))
        answers: dict[int, Answer] = {}
        try:
            while len(answers) < len(self.jobs):
                news = asyncio.ensure_future(self.news.get())
                done, _ = await asyncio.wait({gone, news}, return_when=asyncio.FIRST_COMPLETED)
                if news not in done:
                    news.cancel()
                    return Response(status_code=499)  # nobody reads it
                index, answer = news.result()
                if not isinstance(answer, Answer):
                    return _error(503, _ENDING)
                if answer.finish_reason == "error":
                    return _error(500, NOT_NUMBERS)
                answers[index] = answer
        finally:
            gone.cancel()
            self.served.service.cancel(self.jobs)
        ordered = [answers[index] for index in range(len(self.jobs))]
        choices = [self._choice(i, self._text(i, answer.text), answer) for i, answer in enumerate(ordered)]
        return JSONResponse(self._head() | {"choices": choices, "usage": self._usage(ordered)} | self._origin())

    async def events(self) -> AsyncIterator[str]:
        """Pieces as server-sent events, as they come."""
        answers: list[Answer] = []
        try:
            if self.body.echo:
                for index, prompt in enumerate(self.prompts):
                    yield self._event([self._choice(index, prompt.prompt.text)])
            while len(answers) < len(self.jobs):
                index, news = await self.news.get()
                if news is None or (isinstance(news, Answer) and news.finish_reason == "error"):
                    message = _ENDING if news is None else NOT_NUMBERS
                    yield _event({"error": {"message": message, "type": "server_error", "param": None, "code": None}})
                    return
                if isinstance(news, Answer):
                    answers.append(news)
                    yield self._event([self._choice(index, "", news)], **self._origin())
                else:
                    yield self._event([self._choice(index, news)])
            options = self.body.stream_options
            if options is not None and options.include_usage:
                yield self._event([], usage=self._usage(answers))
            yield "data: [DONE]\n\n"
        finally:
            self.served.service.cancel(self.jobs)

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id, "object": "text_completion", "created": self.created, "model": self.served.name,
            "seed": self.settings.sampling.seed,
        }  # fmt: skip

    def _origin(self) -> dict[str, Any]:
        origin = self.served.provenance
        return {} if origin is None else {"provenance": origin.record(self.settings)}

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        return _event(self._head() | {"choices": choices} | more)

    def _text(self, index: int, text: str) -> str:
        return self.prompts[index].prompt.text + text if self.body.echo else text

    def _choice(self, index: int, text: str, answer: Answer | None = None) -> dict[str, Any]:
        reason = None if answer is None else _FINISH[answer.finish_reason]
        retrieved = None if answer is None else answer.prompt.retrieved
        found = {} if retrieved is None else retrieved.record()  # an addition to OpenAI's form
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason, **found}

    def _usage(self, answers: list[Answer]) -> dict[str, int]:
        # A prompt with several answers is counted once.
        prompts = sum(len(prompt.tokens) for prompt in self.prompts[:: self.body.n or 1])
        new = sum(len(answer.tokens) for answer in answers)
        return {"prompt_tokens": prompts, "completion_tokens": new, "total_tokens": prompts + new}


async def _hangs_up(request: Request) -> None:
    """Over when the client is gone; its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


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
    except OSError as error:
        door.close()
        taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
        raise UsageError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}",
            hint="choose another --port" if taken else "check --host: an address of this machine",
        ) from None
    return door


@contextmanager
def listening(app: FastAPI, door: socket.socket, ended: Callable[[], None]) -> Iterator[None]:
    """Serve ``app`` in a thread beside the body; on the way out, replies under way are finished first.

    Args:
        ended: called when nobody listens any more, whatever the reason.
    """
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # clients that hang up are no news
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
