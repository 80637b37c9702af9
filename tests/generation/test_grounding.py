"""Prompts with passages: exactly the template, whole passages or none, and never a cut prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlm_cli.config.retrieval_section import RetrievalSection
from mlm_cli.data.tokenizer import Tokenizer, load_tokenizer
from mlm_cli.errors import DataError
from mlm_cli.generation.encoding import PromptEncoder
from mlm_cli.generation.grounding import GroundedEncoder, fill
from mlm_cli.generation.knowledge_base import KnowledgeBase
from mlm_cli.generation.passages import Document, Passage, Passages
from mlm_cli.generation.prompts import Prompt

TEXTS = ["the lion sleeps", "the tiger runs far away", "{prompt} the {passages} eats"]


class InOrder:
    """Finds the passages in the order in which they are."""

    def search(self, query: str, k: int) -> list[tuple[int, float]]:
        return [(number, 1.0 / (1 + number)) for number in range(len(TEXTS))][: 0 if query == "nothing" else k]

    def can_ask(self, query: str) -> bool:
        return bool(query)

    def save(self, folder: Path) -> None:
        raise NotImplementedError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("bytes")


@pytest.fixture
def encoder(tokenizer: Tokenizer) -> Callable[..., GroundedEncoder]:
    def make(max_length: int, max_new_tokens: int = 10, **options: Any) -> GroundedEncoder:
        passages = Passages.of((Document(text, "f.txt", 1) for text in TEXTS), 100, 0)
        base = KnowledgeBase(passages, InOrder())
        section = RetrievalSection(documents=("f.txt",), **options.pop("section", {}))
        return GroundedEncoder(
            tokenizer, max_length, base=base, section=section, max_new_tokens=max_new_tokens, **options
        )

    return make


def test_the_template_is_filled_once() -> None:
    passages = [Passage(text, "f", 1, 0) for text in TEXTS]
    assert fill("{passages}\n\n{prompt}", "\n", passages[1:], "Q {passages}?") == (
        "the tiger runs far away\n{prompt} the {passages} eats\n\nQ {passages}?"
    )
    assert fill("Q: {prompt} <{passages}>", "|", passages[:1], "{prompt}") == "Q: {prompt} <the lion sleeps>"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{passages}\n\n{prompt}", " p \n"),
        (" {passages}\n\nQ: {prompt}\nA: ", "Q:  p \n\nA: "),
        ("Read: {passages}\nQ: {prompt} ", "Read: \nQ:  p \n "),
        ("{prompt}\n{passages} ", " p \n"),
        ("Q: {prompt} <{passages}>", "Q:  p \n <>"),
    ],
)
def test_without_passages_the_template_stays(template: str, expected: str) -> None:
    assert fill(template, "\n", [], " p \n") == expected


def test_the_model_is_given_template_passages_and_prompt(
    tokenizer: Tokenizer, encoder: Callable[..., GroundedEncoder]
) -> None:
    section = {"num_passages": 2, "template": "Q: {prompt}\nFrom: {passages}\nA:", "separator": " / "}
    made = encoder(500, section=section, affixes=("<", ">"))
    found = made.encode(Prompt(4, "who?", "id", "line 1", {"a": 1}))
    text = "<Q: who?\nFrom: the lion sleeps / the tiger runs far away\nA:>"
    assert list(found.tokens) == list(PromptEncoder(tokenizer, 500).encode(Prompt(0, text, 0, "")).tokens)
    assert (found.prompt.text, found.prompt.id, found.prompt.number, found.prompt.fields) == ("who?", "id", 4, {"a": 1})
    retrieved = found.prompt.retrieved
    assert retrieved is not None
    assert retrieved.record() == {
        "passages": [
            {"source": "f.txt:1", "offset": 0, "score": 1.0, "text": TEXTS[0]},
            {"source": "f.txt:1", "offset": 0, "score": 0.5, "text": TEXTS[1]},
        ],
        "num_passages_dropped": 0,
    }


@pytest.mark.parametrize("ends", [False, True])
def test_what_does_not_fit_is_left_out_whole(
    tokenizer: Tokenizer, encoder: Callable[..., GroundedEncoder], ends: bool
) -> None:
    """At every context length as many passages as fit beside the answer (an encoder's answer needs no room)."""
    new, prompt = 7, "a prompt?"
    given = [prompt] + ["\n\n".join(TEXTS[:kept]) + "\n\n" + prompt for kept in (1, 2, 3)]
    plain = PromptEncoder(tokenizer, 10_000, ends=ends)
    ids = [list(plain.encode(Prompt(0, text, 0, "")).tokens) for text in given]
    seen = set()
    for context in range(len(ids[0]), len(ids[3]) + new + 3):
        room = context if ends else context - new
        kept = max(k for k in range(4) if k == 0 or len(ids[k]) <= room)
        found = encoder(context, new, ends=ends).encode(Prompt(0, prompt, 0, "here"))
        assert list(found.tokens) == ids[kept]
        assert found.prompt.retrieved is not None
        assert [one.text for one, _ in found.prompt.retrieved.passages] == TEXTS[:kept]
        assert found.prompt.retrieved.num_dropped == 3 - kept
        seen.add(kept)
    assert seen == {0, 1, 2, 3}
    with pytest.raises(DataError, match=rf"here: the prompt has {len(ids[0])} tokens"):
        encoder(len(ids[0]) - 1, new, ends=ends).encode(Prompt(0, prompt, 0, "here"))


def test_a_request_may_ask_for_a_longer_answer(encoder: Callable[..., GroundedEncoder]) -> None:
    made = encoder(120, 10)
    kept = [made.encode(Prompt(0, "p", 0, ""), new).prompt.retrieved for new in (None, 60, 119)]
    assert [len(one.passages) for one in kept if one is not None] == [3, 2, 0]


def test_nothing_found_is_an_empty_list(tokenizer: Tokenizer, encoder: Callable[..., GroundedEncoder]) -> None:
    found = encoder(100, section={"template": "Q: {prompt} {passages}"}).encode(Prompt(0, "nothing", 0, ""))
    assert list(found.tokens) == list(PromptEncoder(tokenizer, 100).encode(Prompt(0, "Q: nothing", 0, "")).tokens)
    assert found.prompt.retrieved is not None and found.prompt.retrieved.passages == ()


def test_what_cannot_be_looked_up_is_refused(encoder: Callable[..., GroundedEncoder]) -> None:
    with pytest.raises(DataError, match=r"f.jsonl:3: an empty prompt, and nothing to look up"):
        encoder(100).encode(Prompt(0, "", 0, "f.jsonl:3"))
    with pytest.raises(DataError, match="prompt: a prompt given as ids"):
        encoder(100).take(Prompt(0, "", 0, "prompt"), [1, 2])
