"""What is asked of `mlm generate --serve`: OpenAI's completions (platform.openai.com/docs/api-reference/completions).

What its clients send is understood or refused by name; nothing is silently left out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from mlm_cli.errors import DataError, MlmError, UsageError
from mlm_cli.generation.answer import EncodedPrompt, Settings
from mlm_cli.generation.encoding import PromptEncoder
from mlm_cli.generation.prompts import Prompt
from mlm_cli.generation.sampling import Sampling

MOST_CHOICES = 128  # of one request
MOST_BYTES = 16 << 20  # of its body
_MOST_CHARACTERS = 64  # a prompt may have for each token of the context: more is not even read
_FORMS = "a text, a list of texts, the ids of one prompt, or a list of such"

_T = TypeVar("_T")


def _writable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no text") from None
    return text


def _nothing(value: _T) -> _T:
    if value:
        raise ValueError("is not supported, and may only be left out or ask for nothing")
    return value


Text = Annotated[str, AfterValidator(_writable)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None


class CompletionRequest(BaseModel):
    """Body of ``POST /v1/completions``; ``top_k`` and ``repetition_penalty`` are additions, named as in vLLM."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Text | None = None
    prompt: Text | list[Text] | list[int] | list[list[int]]
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    n: int | None = Field(default=None, ge=1)
    stop: Text | list[Text] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    echo: bool | None = None
    user: Text | None = None
    # Known to OpenAI's clients, and of use here only as they are when left out.
    best_of: int | None = Field(default=None, ge=1, le=1)
    frequency_penalty: Annotated[float | None, AfterValidator(_nothing)] = None
    presence_penalty: Annotated[float | None, AfterValidator(_nothing)] = None
    logit_bias: Annotated[dict[str, float] | None, AfterValidator(_nothing)] = None
    logprobs: Annotated[int | None, AfterValidator(_nothing)] = None
    suffix: Annotated[str | None, AfterValidator(_nothing)] = None


class Refusal(MlmError):
    """A request that is refused: the status of the reply, and the field that is the matter."""

    def __init__(self, status: int, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.field = status, field


def parse(body: bytes) -> CompletionRequest:
    """Raises Refusal: it is no JSON, or none of this form."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:  # not UTF-8 and numbers without end among them
        raise Refusal(400, f"the body is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise Refusal(400, "the body is to be a JSON object")
    try:
        found = CompletionRequest.model_validate(document)
    except ValidationError as errors:
        first = errors.errors(include_url=False, include_context=False, include_input=False)[0]
        name = str(first["loc"][0])
        forms = name == "prompt" and first["type"] not in ("missing", "value_error")
        raise Refusal(400, f"{name}: {_FORMS}" if forms else f"{name}: {first['msg']}", name) from None
    if found.stream_options is not None and not found.stream:
        raise Refusal(400, "stream_options: only where `stream` is true", "stream_options")
    return found


@dataclass(frozen=True)
class Asked:
    """How a model is asked.

    Attributes:
        settings: what a request does not say.
        vocab_size: ids below it may stand in a prompt given as ids.
        longest: tokens that an answer may have at most; None: what the model's context leaves.
    """

    encoder: PromptEncoder
    settings: Settings
    vocab_size: int
    longest: int | None = None


def prompts_of(body: CompletionRequest, asked: Asked) -> list[EncodedPrompt]:
    """One for each choice, ``n`` after each other for each prompt.

    Raises:
        DataError, UsageError: a prompt that the model cannot read.
    """
    given, n = body.prompt, body.n or 1
    texts = given if isinstance(given, list) and not (given and isinstance(given[0], int)) else [given]
    if not 0 < len(texts) * n <= MOST_CHOICES:
        raise UsageError(f"{len(texts)} prompts with n={n}: a request may have 1 to {MOST_CHOICES} answers")
    if body.echo and any(not isinstance(text, str) for text in texts):
        raise UsageError("echo: a prompt given as ids has no text to give back")
    found: list[EncodedPrompt] = []
    for place, text in enumerate(texts):
        where = f"prompt {place}" if len(texts) > 1 else "prompt"
        encoded = _encoded(text, where, asked, body.max_tokens)
        # The number is what chance depends on beside the seed: the same for equal requests.
        found += [replace(encoded, prompt=replace(encoded.prompt, number=place * n + i)) for i in range(n)]
    return found


def _encoded(given: Any, where: str, asked: Asked, max_new_tokens: int | None) -> EncodedPrompt:
    if isinstance(given, str):
        context = asked.encoder.max_length
        if len(given) > _MOST_CHARACTERS * context:
            raise DataError(f"{where}: {len(given)} characters, and the model's context holds {context} tokens")
        return asked.encoder.encode(Prompt(0, given, None, where), max_new_tokens)
    if not given or min(given) < 0 or max(given) >= asked.vocab_size:
        raise DataError(f"{where}: ids from 0 to {asked.vocab_size - 1}, at least one, make a prompt")
    return asked.encoder.take(Prompt(0, "", None, where), given)


def settings_of(body: CompletionRequest, asked: Asked, seed: int) -> Settings:
    """The server's settings with what the request says; ``seed`` where it says none.

    Raises:
        UsageError: a value out of range.
    """
    given = {
        "temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k,
        "repetition_penalty": body.repetition_penalty, "seed": seed if body.seed is None else body.seed,
    }  # fmt: skip
    values: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    sampling: Sampling = replace(asked.settings.sampling, **values)
    tokens = asked.settings.max_new_tokens if body.max_tokens is None else body.max_tokens
    if asked.longest is not None and tokens > asked.longest:
        raise UsageError(f"max_tokens: {tokens} is more than the {asked.longest} that this server was started with")
    stop = body.stop
    stops = asked.settings.stops if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    return replace(asked.settings, sampling=sampling, max_new_tokens=tokens, stops=stops)
