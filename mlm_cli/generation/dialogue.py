"""`--interactive`: the user writes, the model goes on, within the model's context."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from mlm_cli import log
from mlm_cli.data.tokenizer import Tokenizer
from mlm_cli.generation.answer import Answer, EncodedPrompt, Settings
from mlm_cli.generation.decoder import Decoder
from mlm_cli.generation.encoding import PromptEncoder
from mlm_cli.generation.generator import Generator
from mlm_cli.generation.output import AnswerWriter
from mlm_cli.generation.prompts import Prompt
from mlm_cli.generation.text_stream import text_stream


def read_line() -> str | None:
    """One line from the user, None at the end of input. The prompt sign goes to the terminal, never into data."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        import readline  # noqa: F401 - gives input() its line editing

        try:
            return input("> ")
        except EOFError:
            sys.stderr.write("\n")
            return None
    if sys.stdin.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


class Dialogue:
    """A growing text, written in turns by the user and the model.

    A language model knows no turns, only one text: a line of the user is appended to what was said so far (on a new
    line), and the model goes on. An empty line lets it go on without a word. Once the text and a reply no longer fit
    the context, the oldest tokens are forgotten, and this is said.

    Args:
        ask: gives the user's next line, None when there is no more.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        settings: Settings,
        writer: AnswerWriter,
        ask: Callable[[], str | None] = read_line,
    ) -> None:
        self._decoder, self._tokenizer, self._writer, self._ask = decoder, tokenizer, writer, ask
        room = min(settings.max_new_tokens, decoder.max_length // 2)
        self._longest = decoder.max_length - room
        self._encoder = PromptEncoder(tokenizer, sys.maxsize)  # what is too long is judged here, and kindly
        self._text: list[int] = []
        self._joint = ""
        self._interrupted = False
        self._generator = Generator(
            decoder,
            settings,
            lambda: text_stream(tokenizer),
            show=writer.show if writer.streams else None,
            interrupted=lambda _prompt: self._interrupted,
        )

    def run(self) -> None:
        """Take turns until the user leaves."""
        turn = 0
        while True:
            try:
                line = self._ask()
            except KeyboardInterrupt:
                log.info("\nCtrl-D leaves")
                continue
            if line is None:
                return
            if (line or self._text) and self._hear(line):
                self._reply(Prompt(turn, line, turn, f"line {turn + 1}"))
                turn += 1

    def _hear(self, line: str) -> bool:
        """Append what the user wrote; False if it can never fit."""
        if not self._text:
            new = list(self._encoder.encode(Prompt(0, line, 0, "")).tokens)
        else:
            new = self._tokenizer.encode(self._joint + line) if line else []
        if len(new) > self._longest:
            log.error(f"that is {len(new)} tokens, beside a reply there is room for {self._longest}", "say it shorter")
            return False
        self._text = [*self._text, *new]
        excess = len(self._text) - self._longest
        if excess > 0:
            # Forget more than is needed: the whole text must be read again, which should not happen at every turn.
            excess = min(len(self._text) - max(len(new), 1), excess + self._longest // 4)
            del self._text[:excess]
            if self._decoder.used:
                self._decoder.drop(0)
            log.info(f"(the context is full: the oldest {excess} tokens are forgotten)")
        return True

    def _reply(self, prompt: Prompt) -> None:
        known = self._decoder.length(0) if self._decoder.used else 0
        if known >= len(self._text):  # nothing new to read: read the last token again
            self._decoder.drop(0)
            known = 0
        with self._ctrl_c_stops_a_reply():
            answer = self._generator.continue_text(EncodedPrompt(prompt, self._text), 0, known)
        self._text = [*self._text, *answer.tokens]
        self._joint = "" if answer.finish_reason == "stop" else "\n"
        self._writer.write(answer)
        self._say_why(answer)

    def _say_why(self, answer: Answer) -> None:
        reasons = {"eod": "end of text", "context": "the context is full", "interrupted": "stopped"}
        if answer.finish_reason in reasons:
            log.info(f"({reasons[answer.finish_reason]})")

    @contextmanager
    def _ctrl_c_stops_a_reply(self) -> Iterator[None]:
        """A flag instead of an exception: a step of sliced layers must not be left half done."""
        self._interrupted = False

        def stop(_number: int, _frame: FrameType | None) -> None:
            self._interrupted = True

        previous = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)
