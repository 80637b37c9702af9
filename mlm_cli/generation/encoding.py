"""Prompts to token ids, as the model expects a text to begin."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from mlm_cli.data.special_tokens import Frame
from mlm_cli.data.tokenizer import Tokenizer
from mlm_cli.errors import DataError
from mlm_cli.generation.answer import EncodedPrompt
from mlm_cli.generation.prompts import Prompt


class PromptEncoder:
    """Encodes prompts for one model.

    What stands around a text: see ``special_tokens.Frame``.

    Args:
        max_length: longest prompt in tokens: the model's context.
        ends: texts end with the end-of-document token, as an encoder has been taught; an empty one is that token.
        affixes: what stands before and behind each text that is given as words (not as ids).
    """

    def __init__(
        self, tokenizer: Tokenizer, max_length: int, *, ends: bool = False, affixes: tuple[str, str] = ("", "")
    ) -> None:
        self._tokenizer, self.max_length, self._affixes = tokenizer, max_length, affixes
        if ends and tokenizer.eod_id is None:
            raise DataError(f"tokenizer `{tokenizer.spec}` has no token that ends a text, which the encoder needs")
        self._frame = Frame(tokenizer, ends=ends)

    def ids(self, text: str) -> list[int]:
        """A text between its affixes, as the model is given it; of any length."""
        prefix, suffix = self._affixes
        return list(self._frame.around(self._tokenizer.encode(f"{prefix}{text}{suffix}")))

    def encode(self, prompt: Prompt, max_new_tokens: int | None = None) -> EncodedPrompt:
        """Ids of a prompt.

        Args:
            max_new_tokens: longest answer to this prompt, for encoders that put something before it.

        Raises:
            DataError: longer than the context, or empty with a tokenizer that has no token to begin with.
        """
        tokens = self.ids(prompt.text)
        if not tokens:
            raise DataError(
                f"{prompt.where}: an empty prompt, and the tokenizer has no token that begins a text",
                hint="give at least one word",
            )
        return self.take(prompt, tokens)

    def check(self, prompt: Prompt) -> None:
        """Find out whether a prompt can be encoded. Raises: as ``encode``."""
        self.encode(prompt)

    def take(self, prompt: Prompt, tokens: Sequence[int]) -> EncodedPrompt:
        """A prompt whose ids are known. Raises DataError: longer than the context."""
        if len(tokens) > self.max_length:
            raise DataError(
                f"{prompt.where}: the prompt has {len(tokens)} tokens, the model's context holds {self.max_length}",
                hint="shorten it; nothing is cut off silently",
            )
        return EncodedPrompt(prompt, tokens)

    def encode_all(self, prompts: Iterable[Prompt]) -> Iterator[EncodedPrompt]:
        return map(self.encode, prompts)
