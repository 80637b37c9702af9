"""Answers for many askers at once: jobs come from any thread, one thread owns the decoder and answers them together.

The web is not known here: ``server`` stands between this and HTTP.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from mlm_cli.errors import ResourceError
from mlm_cli.generation.answer import Answer, EncodedPrompt, Settings
from mlm_cli.generation.decoder import Decoder
from mlm_cli.generation.generator import Generator
from mlm_cli.generation.prompts import Prompt
from mlm_cli.generation.text_stream import TextStream


@dataclass(eq=False)
class Job:
    """A prompt that someone waits for. Both functions are called by the thread that answers, and must not block.

    Attributes:
        on_piece: given each piece of the answer's text as soon as it is certain.
        on_end: given the answer, once; None where there will be none.
    """

    prompt: EncodedPrompt
    on_piece: Callable[[str], None]
    on_end: Callable[[Answer | None], None]
    _cancelled: bool = field(default=False, init=False)


class Service:
    """Answers jobs with one decoder. Logits that are not numbers end the one answer, with the reason ``error``.

    Args:
        settings: for prompts that bring none.
        new_stream: makes a ``TextStream`` of the model's tokenizer.
        most_waiting: jobs that may wait for a free row.
        rest: seconds without work after which ranks that follow are told so.
    """

    def __init__(
        self,
        decoder: Decoder,
        settings: Settings,
        new_stream: Callable[[], TextStream],
        *,
        most_waiting: int = 1024,
        rest: float = 30.0,
    ) -> None:
        self._decoder, self._rest, self._most_waiting = decoder, rest, most_waiting
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._waiting = set[Job]()  # those of the queue that are not cancelled
        self._numbers, self._jobs = itertools.count(), dict[int, Job]()
        self._closed, self._at_once = False, False
        self._lock = threading.RLock()  # a signal may stop a service that is stopping
        self._generator = Generator(
            decoder, settings, new_stream, show=self._show, interrupted=self._interrupted, strict=False
        )

    def submit(self, jobs: Sequence[Job]) -> None:
        """Have jobs answered, all of them or none; from any thread.

        Raises:
            ResourceError: too many are waiting already, or the service is ending.
        """
        with self._lock:  # nothing comes behind the mark that ends the queue
            if self._closed:
                raise ResourceError("the server is ending")
            if len(self._waiting) + len(jobs) > self._most_waiting:
                raise ResourceError(f"{len(self._waiting)} prompts are waiting already", hint="try again later")
            self._waiting.update(jobs)
            for job in jobs:
                self._queue.put(job)

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these jobs any more, if they are not done; from any thread."""
        with self._lock:
            for job in jobs:
                job._cancelled = True
            self._waiting.difference_update(jobs)

    def stop(self, *, at_once: bool = False) -> None:
        """Take no more jobs, and end when those taken are answered (``at_once``: where they are)."""
        with self._lock:
            self._at_once = self._at_once or at_once
            if not self._closed:
                self._closed = True
                self._queue.put(None)

    def run(self) -> None:
        """Answer until stopped. Whatever ends it, every job is told."""
        try:
            for _, answer in self._generator.as_done(self._prompts()):
                self._jobs.pop(answer.prompt.id).on_end(None if answer.finish_reason == "interrupted" else answer)
        finally:
            self.stop()
            while (job := self._queue.get()) is not None:
                job.on_end(None)
            for job in self._jobs.values():
                job.on_end(None)

    def _prompts(self) -> Iterator[EncodedPrompt | None]:
        """The next prompt; waits for one only while none is in the making."""
        while True:
            busy = self._generator.busy
            try:
                job = self._queue.get(block=not busy, timeout=self._rest)
            except queue.Empty:
                if not busy:
                    self._decoder.rest()
                yield None
                continue
            if job is None:
                self._queue.put(None)  # for `run`, which empties the queue up to here
                return
            with self._lock:
                self._waiting.discard(job)
            if job._cancelled or self._at_once:
                job.on_end(None)
                continue
            number = next(self._numbers)
            self._jobs[number] = job
            yield replace(job.prompt, prompt=replace(job.prompt.prompt, id=number))

    def _show(self, prompt: Prompt, piece: str) -> None:
        self._jobs[prompt.id].on_piece(piece)

    def _interrupted(self, prompt: Prompt) -> bool:
        return self._at_once or self._jobs[prompt.id]._cancelled
