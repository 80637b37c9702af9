"""Prompts with passages before them (Lewis et al. 2020; Ram et al. 2023, In-Context Retrieval-Augmented Models)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mlm_cli.config.retrieval_section import PASSAGES, PROMPT, RetrievalSection
from mlm_cli.data.tokenizer import Tokenizer
from mlm_cli.errors import DataError
from mlm_cli.generation.answer import EncodedPrompt
from mlm_cli.generation.encoding import PromptEncoder
from mlm_cli.generation.knowledge_base import KnowledgeBase
from mlm_cli.generation.passages import Passage
from mlm_cli.generation.prompts import Prompt


def fill(template: str, separator: str, passages: Sequence[Passage], prompt: str) -> str:
    """The text that a model is given; what looks like a mark inside passages or prompt is left alone.

    Without passages the white space that parted them from the prompt goes too, where they began or ended the text.
    """
    values = {PASSAGES: separator.join(passage.text for passage in passages), PROMPT: prompt}
    first, second = sorted(values, key=template.index)
    before, _, rest = template.partition(first)
    between, _, after = rest.partition(second)
    if not passages and first == PASSAGES and not before.strip():
        before, between = "", between.lstrip()
    if not passages and second == PASSAGES and not after.strip():
        between, after = between.rstrip(), ""
    return f"{before}{values[first]}{between}{values[second]}{after}"


class GroundedEncoder(PromptEncoder):
    """Encodes prompts with the passages that were found for them. Safe to call from several threads.

    Passages that do not fit are left out whole, the worst first, so that the prompt stays as it is and a causal model
    keeps room for its answer.

    Args:
        max_new_tokens: longest answer, where none is given with a prompt.
        the others: see ``PromptEncoder``.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_length: int,
        *,
        base: KnowledgeBase,
        section: RetrievalSection,
        max_new_tokens: int,
        ends: bool = False,
        affixes: tuple[str, str] = ("", ""),
    ) -> None:
        super().__init__(tokenizer, max_length, ends=ends, affixes=affixes)
        self._base, self._section, self._max_new_tokens = base, section, max_new_tokens
        self._shares_context = not ends  # an encoder-decoder's answer takes no room of what is read

    def encode(self, prompt: Prompt, max_new_tokens: int | None = None) -> EncodedPrompt:
        """Ids of passages and prompt; ``prompt.retrieved`` of the result says which.

        Raises:
            DataError: as ``PromptEncoder``; nothing in the prompt to look up.
        """
        section, room = self._section, self.max_length
        if self._shares_context:
            room -= self._max_new_tokens if max_new_tokens is None else max_new_tokens
        retrieved = self._base.search(prompt.text, section.num_passages, prompt.where)
        passages = [passage for passage, _ in retrieved.passages]
        for kept in range(len(passages), -1, -1):
            tokens = self.ids(fill(section.template, section.separator, passages[:kept], prompt.text))
            if len(tokens) <= room:
                break
        retrieved = replace(retrieved, passages=retrieved.passages[:kept], num_dropped=len(passages) - kept)
        return super().take(replace(prompt, retrieved=retrieved), tokens)

    def check(self, prompt: Prompt) -> None:
        """Nothing is looked up: it is without passages that a prompt has the most room."""
        self._base.check(prompt.text, prompt.where)
        super().take(prompt, self.ids(fill(self._section.template, self._section.separator, (), prompt.text)))

    def take(self, prompt: Prompt, tokens: Sequence[int]) -> EncodedPrompt:
        """Raises DataError: ids are no text to look up."""
        raise DataError(f"{prompt.where}: a prompt given as ids cannot be looked up", hint="give it as text")
