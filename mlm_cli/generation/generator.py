"""From prompts to answers: one loop that keeps a few rows of a decoder busy.

A row that ends is given to the next prompt at once, so texts of different length cost each other nothing, and answers
still come out in the order of the prompts. What a prompt's answer is depends on nothing but the prompt, its number, the
model and the settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from mlm_cli.errors import UsageError
from mlm_cli.generation.decoder import Decoder
from mlm_cli.generation.prompts import Prompt
from mlm_cli.generation.sampling import Sampling, choose, uniform
from mlm_cli.generation.stopping import StopScanner
from mlm_cli.generation.text_stream import TextStream

# eod: the model ended its text. stop: a stop string. length: max_new_tokens. context: the model's context is full.
FinishReason = Literal["eod", "stop", "length", "context", "interrupted"]


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt and its token ids, at least one and at most the model's context."""

    prompt: Prompt
    tokens: Sequence[int]


@dataclass(frozen=True)
class Answer:
    """What was made of a prompt.

    Attributes:
        text: without the prompt, the stop string and special tokens.
        tokens: the ids behind the text, without the end-of-document id; those of a stop string are among them.
    """

    prompt: Prompt
    text: str
    finish_reason: FinishReason
    num_prompt_tokens: int
    tokens: list[int]

    def record(self) -> dict[str, Any]:
        """The line of JSON: fields of the prompt's own line first, those of the answer win."""
        return {
            **self.prompt.fields,
            "id": self.prompt.id,
            "prompt": self.prompt.text,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_tokens": len(self.tokens),
        }


@dataclass(frozen=True)
class Settings:
    """How every prompt of a run is answered.

    Attributes:
        sampling: how a token is chosen.
        max_new_tokens: longest answer.
        stops: an answer ends before the first of these strings.
        end_ids: ids that end a text.
    """

    sampling: Sampling
    max_new_tokens: int = 128
    stops: tuple[str, ...] = ()
    end_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max-new-tokens {self.max_new_tokens} leaves nothing to do", hint="use 1 or more")
        StopScanner(self.stops)  # refuses empty stop strings


@dataclass
class _Row:
    """A text in the making."""

    source: EncodedPrompt
    num_prefix: int  # tokens the answer goes on from
    position: int
    stream: TextStream
    scanner: StopScanner
    seen: Tensor
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish: FinishReason | None = None

    @property
    def length(self) -> int:
        return self.num_prefix + len(self.tokens)


class Generator:
    """Answers prompts.

    Args:
        decoder: the model.
        settings: for all prompts.
        new_stream: makes a ``TextStream`` of the model's tokenizer.
        show: called with each piece of text as soon as it is certain. Pieces of several rows come interleaved.
        interrupted: asked once a token; True ends what is being made with the reason ``interrupted``.
    """

    def __init__(
        self,
        decoder: Decoder,
        settings: Settings,
        new_stream: Callable[[], TextStream],
        *,
        show: Callable[[Prompt, str], None] | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self._decoder, self._settings, self._new_stream = decoder, settings, new_stream
        self._show, self._interrupted = show, interrupted
        self._rows: list[_Row] = []
        self._waiting: dict[int, Answer] = {}

    def answers(self, prompts: Iterable[EncodedPrompt]) -> Iterator[Answer]:
        """The answers, in the order of the prompts, each as soon as it and all before it are done."""
        source = enumerate(prompts)
        next_out, more = 0, True
        while True:
            while more and self._decoder.used < self._decoder.num_slots:
                position, prompt = next(source, (-1, None))
                if prompt is None:
                    more = False
                    break
                row = self._begin(prompt, position)
                self._accept([row], self._decoder.add(prompt.tokens)[None])
                self._retire()
            while next_out in self._waiting:
                yield self._waiting.pop(next_out)
                next_out += 1
            if not self._rows and not more:
                return
            if self._rows:
                self._accept(self._rows, self._decoder.step([row.tokens[-1] for row in self._rows]))
                self._retire()

    def continue_text(self, prompt: EncodedPrompt, row: int, known: int) -> Answer:
        """Answer one prompt whose first ``known`` tokens row ``row`` of the decoder has already seen.

        The row is kept, so that the next turn of a conversation reads only what is new.
        """
        self._rows = []
        text = self._begin(prompt, 0)
        self._accept([text], self._decoder.extend(row, prompt.tokens[known:])[None])
        while text.finish is None:
            self._accept([text], self._decoder.step([text.tokens[-1]]))
        self._rows = []
        return self._answer(text)

    def _begin(self, source: EncodedPrompt, position: int) -> _Row:
        seen, prefix = torch.empty(0, dtype=torch.int64), self._decoder.prefix(source.tokens)
        if self._settings.sampling.repetition_penalty != 1:
            seen = torch.empty(self._decoder.max_length + 1, dtype=torch.int64)
            seen[: len(prefix)] = torch.tensor(prefix)
        row = _Row(source, len(prefix), position, self._new_stream(), StopScanner(self._settings.stops), seen)
        self._rows.append(row)
        return row

    def _accept(self, rows: list[_Row], logits: Tensor) -> None:
        """Choose the next token of each row from ``logits [b, v]`` and take it in."""
        sampling = self._settings.sampling
        seen = numbers = None
        if sampling.repetition_penalty != 1:
            seen = [row.seen[: row.length].to(logits.device) for row in rows]
        if not sampling.greedy:
            numbers = [uniform(sampling.seed, row.source.prompt.number, len(row.tokens)) for row in rows]
        interrupted = self._interrupted()
        for row, token in zip(rows, choose(logits, sampling, seen, numbers), strict=True):
            self._take(row, token)
            if interrupted and row.finish is None:
                row.finish = "interrupted"
            if row.finish is not None:
                self._end(row)

    def _take(self, row: _Row, token: int) -> None:
        """Add one token to a row, and see whether that ends it."""
        if token in self._settings.end_ids:
            row.finish = "eod"
            return
        if len(row.seen):
            row.seen[row.length] = token
        row.tokens.append(token)
        self._say(row, row.scanner.feed(row.stream.feed(token)))
        if row.scanner.found is not None:
            row.finish = "stop"
        elif len(row.tokens) >= self._settings.max_new_tokens:
            row.finish = "length"
        elif row.length > self._decoder.max_length:
            row.finish = "context"

    def _end(self, row: _Row) -> None:
        """Let out what was held back."""
        if row.finish != "stop":
            self._say(row, row.scanner.feed(row.stream.flush()))
            if row.scanner.found is None:
                self._say(row, row.scanner.flush())
            else:
                row.finish = "stop"

    def _say(self, row: _Row, piece: str) -> None:
        if piece:
            row.pieces.append(piece)
            if self._show is not None:
                self._show(row.source.prompt, piece)

    def _retire(self) -> None:
        """Move finished rows out; the last row takes the place, in the decoder and here."""
        for index in range(len(self._rows) - 1, -1, -1):
            row = self._rows[index]
            if row.finish is not None:
                self._decoder.drop(index)
                self._waiting[row.position] = self._answer(row)
                last = self._rows.pop()
                if last is not row:
                    self._rows[index] = last

    def _answer(self, row: _Row) -> Answer:
        assert row.finish is not None
        return Answer(row.source.prompt, "".join(row.pieces), row.finish, len(row.source.tokens), row.tokens)
