"""Searches: ways to choose an answer that follow several continuations of a text at once, in rows side by side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from mlm_cli.generation.answer import Answer, Draft, EncodedPrompt, Settings, in_order, not_numbers
from mlm_cli.generation.decoder import Decoder
from mlm_cli.generation.prompts import Prompt
from mlm_cli.generation.sampling import penalise_repetition
from mlm_cli.generation.text_stream import TextStream


@dataclass(eq=False, kw_only=True)
class Searched(Draft):
    """A text whose continuations are searched.

    Attributes:
        position: its place among the prompts.
        prefix: ids that the answer goes on from.
        next_tokens: of each of its rows, the token that is to be read next.
        parents: of each of its rows, which of them it was before the last step.
    """

    position: int
    prefix: Sequence[int]
    next_tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)


T = TypeVar("T", bound=Searched)


class Search(ABC, Generic[T]):
    """Answers prompts, each with ``settings.width`` rows of the decoder; ``Generator`` follows one row a text.

    What a prompt's answer is depends on nothing but the prompt, the model and the settings.

    Args:
        decoder: the model, with at least ``settings.width`` rows; see ``answerer.decoder_of``.
        settings: for all prompts; of the sampling penalty, watermark and number of candidates alone are read.
        new_stream: makes a ``TextStream`` of the model's tokenizer.
        show: called with each piece of text as soon as it is certain.

    Raises:
        UsageError: a vocabulary too small for such a search.
    """

    text_type: ClassVar[type[Searched]]

    def __init__(
        self,
        decoder: Decoder,
        settings: Settings,
        new_stream: Callable[[], TextStream],
        *,
        show: Callable[[Prompt, str], None] | None = None,
    ) -> None:
        assert decoder.num_slots >= settings.width
        self._decoder, self._settings, self._new_stream = decoder, settings, new_stream
        self._width, self._show, self._texts = settings.width, show, list[T]()
        self._check_vocabulary(decoder.model.vocab_size)

    def answers(self, prompts: Iterable[EncodedPrompt]) -> Iterator[Answer]:
        """The answers, in the order of the prompts, each as soon as it and all before it are done."""
        return in_order(self.as_done(iter(prompts)))

    def as_done(self, prompts: Iterator[EncodedPrompt]) -> Iterator[tuple[int, Answer]]:
        """(place among the prompts, answer) as they are done.

        Raises:
            NumericsError: the model's logits are not numbers.
        """
        decoder, texts, width = self._decoder, self._texts, self._width
        position, more = 0, True
        while more or texts:
            while more and decoder.used + width <= decoder.num_slots:
                prompt = next(prompts, None)
                if prompt is None:
                    more = False
                    break
                self._add(prompt, position)
                position += 1
                yield from self._retire()
            if texts:
                logits = _checked(decoder.step([token for text in texts for token in text.next_tokens]))
                self._take(logits.view(len(texts), width, -1))
                yield from self._retire()

    def _add(self, prompt: EncodedPrompt, position: int) -> None:
        """Read a prompt, and let its row be ``width`` of them."""
        decoder, row = self._decoder, self._decoder.used
        logits = _checked(decoder.add(prompt.tokens))
        prefix = decoder.prefix(prompt.tokens)
        text: T = self.text_type(  # type: ignore[assignment]
            prompt,
            self._settings,
            len(prefix),
            decoder.max_length,
            self._new_stream(),
            self._show,
            position=position,
            prefix=prefix,
        )
        decoder.arrange([*range(row), *[row] * self._width])
        self._texts.append(text)
        self._begin(text, logits)
        text.parents = list(range(self._width))  # its rows are all the same

    def _retire(self) -> Iterator[tuple[int, Answer]]:
        """Rows become what their parents were; those of finished texts go."""
        done = [text for text in self._texts if text.finish is not None]
        going = [(place, text) for place, text in enumerate(self._texts) if text.finish is None]
        self._decoder.arrange([place * self._width + parent for place, text in going for parent in text.parents])
        self._texts[:] = [text for _, text in going]
        for text in self._texts:
            text.parents = list(range(self._width))
        for text in done:
            text.let_out()
            yield text.position, text.answer()

    def _adjust(self, scores: Tensor, text: T, answer: Sequence[int]) -> None:
        """Penalty and watermark, in ``scores [v]``, of what comes next in a text that goes on with ``answer``."""
        rule = self._settings.sampling
        if rule.repetition_penalty == 1 and rule.watermark is None:
            return
        ids = [*text.prefix, *answer]
        if rule.repetition_penalty != 1:
            penalise_repetition(scores, torch.tensor(ids, device=scores.device), rule.repetition_penalty)
        if rule.watermark is not None:
            rule.watermark.mark(scores[None], [ids])

    @abstractmethod
    def _check_vocabulary(self, size: int) -> None:
        """Raise UsageError where there are fewer tokens than the search chooses among."""

    @abstractmethod
    def _begin(self, text: T, logits: Tensor) -> None:
        """Choose from ``logits [v]`` behind the prompt: set ``next_tokens``, or end the text."""

    @abstractmethod
    def _take(self, logits: Tensor) -> None:
        """Go on from ``logits [t, width, v]`` of all texts: set their ``parents`` and ``next_tokens``, or end them."""


def _checked(logits: Tensor) -> Tensor:
    """In float32. Raises NumericsError where they are not numbers."""
    logits = logits.float()
    if not bool(torch.isfinite(logits.amax(-1)).all()):
        raise not_numbers()
    return logits
