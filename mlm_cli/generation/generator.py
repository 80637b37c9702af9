"""From prompts to answers: one loop that keeps a few rows of a decoder busy.

A row that ends is given to the next prompt at once, so texts of different length cost each other nothing (continuous
batching; Yu et al. 2022, Orca, section 3.1). What a prompt's answer is depends on nothing but the prompt, its number,
the model and the settings.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlm_cli.generation.answer import Answer, Draft, EncodedPrompt, Settings, in_order
from mlm_cli.generation.decoder import Decoder
from mlm_cli.generation.prompts import Prompt
from mlm_cli.generation.sampling import Sampling, choose, uniform
from mlm_cli.generation.text_stream import TextStream


@dataclass(eq=False, kw_only=True)
class _Row(Draft):
    """A text in a row of the decoder.

    Attributes:
        rule: its sampling without the seed: rows with the same one are chosen for together.
        position: its place among the prompts.
        seen: ids of prompt and answer so far, ``length`` of them, where there is a repetition penalty.
        recent: the last of these ids, as many as a watermark looks at.
    """

    rule: Sampling
    position: int
    seen: Tensor
    recent: deque[int]


class Generator:
    """Answers prompts.

    Args:
        decoder: the model.
        settings: for all prompts that bring none.
        new_stream: makes a ``TextStream`` of the model's tokenizer.
        show: called with each piece of text as soon as it is certain. Pieces of several rows come interleaved.
        interrupted: asked once a token of a prompt; True ends its answer with the reason ``interrupted``.
        strict: logits that are not numbers are a NumericsError; else they end the answer, with the reason ``error``.
    """

    def __init__(
        self,
        decoder: Decoder,
        settings: Settings,
        new_stream: Callable[[], TextStream],
        *,
        show: Callable[[Prompt, str], None] | None = None,
        interrupted: Callable[[Prompt], bool] = lambda _prompt: False,
        strict: bool = True,
    ) -> None:
        self._decoder, self._settings, self._new_stream = decoder, settings, new_stream
        self._show, self._interrupted, self._strict = show, interrupted, strict
        self._rows: list[_Row] = []

    @property
    def busy(self) -> bool:
        """Is a text in the making?"""
        return bool(self._rows)

    def answers(self, prompts: Iterable[EncodedPrompt]) -> Iterator[Answer]:
        """The answers, in the order of the prompts, each as soon as it and all before it are done."""
        return in_order(self.as_done(iter(prompts)))

    def as_done(self, prompts: Iterator[EncodedPrompt | None]) -> Iterator[tuple[int, Answer]]:
        """(place among the prompts, answer) as they are done.

        Args:
            prompts: asked for the next whenever there is a free row; None: none has come yet.
        """
        position, more = 0, True
        while more or self._rows:
            while more and self._decoder.used < self._decoder.num_slots:
                try:
                    prompt = next(prompts)
                except StopIteration:
                    more = False
                    break
                if prompt is None:
                    break
                row = self._begin(prompt, position)
                position += 1
                self._accept([row], self._decoder.add(prompt.tokens)[None])
                yield from self._retire()
            if self._rows:
                self._accept(self._rows, self._decoder.step([row.tokens[-1] for row in self._rows]))
                yield from self._retire()

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
        return text.answer()

    def _begin(self, source: EncodedPrompt, position: int) -> _Row:
        settings = source.settings or self._settings
        seen, prefix = torch.empty(0, dtype=torch.int64), self._decoder.prefix(source.tokens)
        if settings.sampling.repetition_penalty != 1:
            seen = torch.empty(self._decoder.max_length + 1, dtype=torch.int64)
            seen[: len(prefix)] = torch.tensor(prefix)
        mark = settings.sampling.watermark
        row = _Row(
            source,
            settings,
            len(prefix),
            self._decoder.max_length,
            self._new_stream(),
            self._show,
            rule=replace(settings.sampling, seed=0),
            position=position,
            seen=seen,
            recent=deque(prefix, maxlen=0 if mark is None else mark.context),
        )
        self._rows.append(row)
        return row

    def _accept(self, rows: list[_Row], logits: Tensor) -> None:
        """Choose the next token of each row from ``logits [b, v]`` and take it in."""
        for row, token in zip(rows, self._choose(rows, logits), strict=True):
            interrupted = self._interrupted(row.source.prompt)
            self._take(row, token)
            if interrupted and row.finish is None:
                row.finish = "interrupted"
            if row.finish is not None:
                row.let_out()

    def _choose(self, rows: list[_Row], logits: Tensor) -> list[int]:
        """The next token of each row, by its own rule."""
        rule = rows[0].rule
        others = [index for index, row in enumerate(rows) if row.rule != rule]
        if others:
            these = [index for index, row in enumerate(rows) if row.rule == rule]
            chosen: dict[int, int] = {}
            for members in (these, others):
                chosen.update(
                    zip(members, self._choose([rows[index] for index in members], logits[members]), strict=True)
                )
            return [chosen[index] for index in range(len(rows))]
        seen = numbers = None
        if rule.repetition_penalty != 1:
            seen = [row.seen[: row.length].to(logits.device) for row in rows]
        if not rule.greedy:
            numbers = [uniform(row.settings.sampling.seed, row.source.prompt.number, len(row.tokens)) for row in rows]
        return choose(logits, rule, seen, numbers, [list(row.recent) for row in rows])

    def _take(self, row: _Row, token: int) -> None:
        """Add one token to a row, and see whether that ends it."""
        if token < 0:
            row.fail(strict=self._strict)
            return
        length = row.length
        row.take(token)
        if row.length > length:
            row.recent.append(token)
            if len(row.seen):
                row.seen[length] = token

    def _retire(self) -> Iterator[tuple[int, Answer]]:
        """Move finished rows out; the last row takes the place, in the decoder and here."""
        for index in range(len(self._rows) - 1, -1, -1):
            row = self._rows[index]
            if row.finish is not None:
                self._decoder.drop(index)
                last = self._rows.pop()
                if last is not row:
                    self._rows[index] = last
                yield row.position, row.answer()
