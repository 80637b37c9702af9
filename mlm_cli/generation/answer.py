"""A prompt's answer, finished and in the making, whichever way its tokens are chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mlm_cli.config.section import MOST_CANDIDATES
from mlm_cli.errors import NumericsError, UsageError
from mlm_cli.generation.prompts import Prompt
from mlm_cli.generation.sampling import Sampling
from mlm_cli.generation.stopping import StopScanner
from mlm_cli.generation.text_stream import TextStream

# eod: the model ended its text. stop: a stop string. length: max_new_tokens. context: the model's context is full.
# error: the model's logits are not numbers.
FinishReason = Literal["eod", "stop", "length", "context", "interrupted", "error"]
NOT_NUMBERS = "the model's logits are not finite numbers"


def not_numbers() -> NumericsError:
    """What a model whose logits are not numbers comes to."""
    return NumericsError(NOT_NUMBERS, hint="check the checkpoint, or use fp32")


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
            **(self.prompt.retrieved.record() if self.prompt.retrieved is not None else {}),
        }


@dataclass(frozen=True)
class Settings:
    """How every prompt of a run is answered.

    Attributes:
        sampling: how a token is chosen.
        max_new_tokens: longest answer.
        stops: an answer ends before the first of these strings.
        end_ids: ids that end a text.
        beams: hypotheses of a beam search; 1: none.
        length_penalty: of a beam search, see there.
        contrastive_alpha: of a contrastive search among the ``top_k`` of the sampling, see there; 0: none.

    Raises:
        UsageError: a value out of range, or what excludes each other.
    """

    sampling: Sampling
    max_new_tokens: int = 128
    stops: tuple[str, ...] = ()
    end_ids: frozenset[int] = frozenset()
    beams: int = 1
    length_penalty: float = 1.0
    contrastive_alpha: float = 0.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max-new-tokens {self.max_new_tokens} leaves nothing to do", hint="use 1 or more")
        StopScanner(self.stops)  # refuses empty stop strings
        if self.beams > 1 and self.contrastive_alpha:
            raise UsageError(
                f"generate.beams={self.beams} and generate.contrastive_alpha={self.contrastive_alpha} are two searches",
                hint="use one of them",
            )
        if self.contrastive_alpha and not 2 <= self.sampling.top_k <= MOST_CANDIDATES:
            raise UsageError(
                f"contrastive search chooses among the 2 to {MOST_CANDIDATES} likeliest tokens, and top-k is "
                f"{self.sampling.top_k}",
                hint="use --top-k 4",
            )
        if self.contrastive_alpha and self.sampling.watermark is not None:
            raise UsageError(
                "contrastive search writes no watermark: what it weighs is not the model's score alone",
                hint="leave generate.contrastive_alpha or generate.watermark_bias out",
            )
        if self.length_penalty != 1 and self.beams == 1:
            raise UsageError(
                f"length_penalty {self.length_penalty} is for a beam search, and there is none",
                hint="set beams too, or leave it out",
            )
        if self.searches:
            self._refuse_sampling()

    @property
    def searches(self) -> bool:
        """Is an answer searched for, rather than sampled (or greedy)?"""
        return self.beams > 1 or self.contrastive_alpha > 0

    @property
    def width(self) -> int:
        """Rows of a decoder that a text needs."""
        return self.sampling.top_k if self.contrastive_alpha else self.beams

    def _refuse_sampling(self) -> None:
        """What has no meaning for a search is said, rather than passed over."""
        rule = self.sampling
        for name, value, asked in (
            ("temperature", rule.temperature, rule.temperature not in (0, 1)),
            ("top-p", rule.top_p, rule.top_p != 1),
            ("top-k", rule.top_k, self.beams > 1 and rule.top_k != 0),
        ):
            if asked:
                raise UsageError(
                    f"{name} {value} is for sampling, and generate."
                    f"{'beams' if self.beams > 1 else 'contrastive_alpha'} searches",
                    hint="leave one of them out",
                )


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt and its token ids, at least one and at most the model's context.

    ``settings``: of this prompt alone, instead of those of all.
    """

    prompt: Prompt
    tokens: Sequence[int]
    settings: Settings | None = None


@dataclass(eq=False)
class Draft:
    """A text in the making.

    Attributes:
        settings: of this text.
        num_prefix: tokens the answer goes on from.
        max_length: tokens the model's context holds.
        stream: of the model's tokenizer.
        show: called with each piece of text as soon as it is certain.
        finish: why it has ended; None: it has not.
    """

    source: EncodedPrompt
    settings: Settings
    num_prefix: int
    max_length: int
    stream: TextStream
    show: Callable[[Prompt, str], None] | None = None
    tokens: list[int] = field(default_factory=list)
    finish: FinishReason | None = None

    def __post_init__(self) -> None:
        self._scanner, self._pieces = StopScanner(self.settings.stops), list[str]()

    @property
    def length(self) -> int:
        return self.num_prefix + len(self.tokens)

    @property
    def limit(self) -> int:
        """Tokens that the answer may have."""
        return min(self.settings.max_new_tokens, self.max_length + 1 - self.num_prefix)

    def take(self, token: int) -> None:
        """Add a token, and see whether that ends the text."""
        if token in self.settings.end_ids:
            self.finish = "eod"
            return
        self.tokens.append(token)
        self._say(self._scanner.feed(self.stream.feed(token)))
        if self._scanner.found is not None:
            self.finish = "stop"
        elif len(self.tokens) >= self.settings.max_new_tokens:
            self.finish = "length"
        elif self.length > self.max_length:
            self.finish = "context"

    def fail(self, *, strict: bool) -> None:
        """The model's logits are not numbers: a NumericsError, or the end of this text alone."""
        if strict:
            raise not_numbers()
        self.finish = "error"

    def let_out(self) -> None:
        """When the text has ended: let out what was held back."""
        if self.finish != "stop":
            self._say(self._scanner.feed(self.stream.flush()))
            if self._scanner.found is None:
                self._say(self._scanner.flush())
            else:
                self.finish = "stop"

    def answer(self) -> Answer:
        assert self.finish is not None
        prompt = self.source.prompt
        return Answer(prompt, "".join(self._pieces), self.finish, len(self.source.tokens), self.tokens)

    def _say(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
            if self.show is not None:
                self.show(self.source.prompt, piece)


def in_order(done: Iterator[tuple[int, Answer]]) -> Iterator[Answer]:
    """Answers with their places, as they are done, -> in the order of the places, each as soon as it can be."""
    waiting: dict[int, Answer] = {}
    next_out = 0
    for place, answer in done:
        waiting[place] = answer
        while next_out in waiting:
            yield waiting.pop(next_out)
            next_out += 1
