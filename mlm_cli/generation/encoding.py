"""Prompts to token ids, as the model expects a text to begin."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from mlm_cli.data.special_tokens import begin_ids
from mlm_cli.data.tokenizer import Tokenizer
from mlm_cli.errors import DataError
from mlm_cli.generation.generator import EncodedPrompt
from mlm_cli.generation.prompts import Prompt


class PromptEncoder:
    """Encodes prompts for one model.

    Where the tokenizer's own template begins a text with its beginning-of-sequence token (Llama's does, GPT-2's does
    not), so do we: a model asked in `transformers` sees the same ids. An empty prompt is the beginning of a document:
    the beginning-of-sequence token, or else the end-of-document token that precedes every document in training.

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
        self._tail = [tokenizer.eod_id] if ends and tokenizer.eod_id is not None else []
        self._lead = begin_ids(tokenizer)

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Ids of a prompt.

        Raises:
            DataError: longer than the context, or empty with a tokenizer that has no token to begin with.
        """
        prefix, suffix = self._affixes
        tokens = self._lead + self._tokenizer.encode(f"{prefix}{prompt.text}{suffix}") + self._tail
        if not tokens:
            begin = self._tokenizer.bos_id if self._tokenizer.bos_id is not None else self._tokenizer.eod_id
            if begin is None:
                raise DataError(
                    f"{prompt.where}: an empty prompt, and the tokenizer has no token that begins a text",
                    hint="give at least one word",
                )
            tokens = [begin]
        return self.take(prompt, tokens)

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
