"""Whole answers, against `transformers` generate on the same folder and against themselves in other company."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

from mlm_cli.checkpoint.hub import load_model_folder
from mlm_cli.errors import UsageError
from mlm_cli.generation.answer import Answer, EncodedPrompt, Settings
from mlm_cli.generation.decoder import Decoder
from mlm_cli.generation.generator import Generator
from mlm_cli.generation.prompts import Prompt
from mlm_cli.generation.sampling import Sampling
from mlm_cli.generation.text_stream import TextStream
from mlm_cli.parallel.context import ParallelContext
from tests.generation.folders import save_folder

TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 20,
    "naïve café — 東京 🙂 " * 40,
    "def f(x):\n    return x\n" * 30,
]
PROMPTS = [[5, 9, 200, 31], [17], list(range(40, 70)), [300, 2, 2, 300, 2], [399], list(range(100, 113)), [8, 8, 8]]


class Pair(NamedTuple):
    """A model folder and the same model in `transformers`."""

    folder: Path
    model: transformers.PreTrainedModel


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp(request.param)
    return Pair(folder, save_folder(folder, request.param, TEXTS))


class Numbers(TextStream):
    """Shows ids instead of text."""

    def feed(self, token: int) -> str:
        return f"{token} "

    def flush(self) -> str:
        return ""


def encoded(prompts: list[list[int]]) -> list[EncodedPrompt]:
    return [EncodedPrompt(Prompt(n, "", n, ""), tokens) for n, tokens in enumerate(prompts)]


def answers(model: Any, prompts: list[EncodedPrompt], slots: int = 1, **settings: Any) -> list[Answer]:
    sampling = Sampling(**{k: settings.pop(k) for k in list(settings) if k in Sampling.__dataclass_fields__})
    settings.setdefault("end_ids", frozenset({0}))
    generator = Generator(Decoder(model, slots), Settings(sampling, **settings), Numbers)
    return list(generator.answers(prompts))


@pytest.fixture(scope="module")
def model(pair: Pair) -> Any:
    return load_model_folder(pair.folder, ParallelContext.single())[0].eval()


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_answers_are_those_of_transformers(pair: Pair, model: Any, penalty: float) -> None:
    ours = answers(model, encoded(PROMPTS), slots=3, temperature=0, max_new_tokens=40, repetition_penalty=penalty)
    lengths = set()
    for prompt, answer in zip(PROMPTS, ours, strict=True):
        theirs = pair.model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=40, repetition_penalty=penalty, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert answer.tokens == [token for token in theirs if token != 0]
        assert answer.finish_reason == ("eod" if theirs[-1] == 0 else "length")
        lengths.add(len(set(theirs)))
    assert max(lengths) > 10, "the model only repeats itself: the test shows nothing"


def test_cached_logits_are_those_of_a_full_pass(model: Any) -> None:
    """Rows of different length, growing, leaving and joining: each as if it were read afresh."""
    decoder = Decoder(model, 3)
    texts = [list(p) for p in PROMPTS[:3]]
    for text in texts:
        full = model.gather_logits(model(torch.tensor([text])))[0, -1]
        torch.testing.assert_close(decoder.add(text), full, rtol=1e-4, atol=1e-4)
    for turn in range(8):
        if turn == 3:
            decoder.drop(0)
            texts[0] = texts.pop()
        if turn == 5:
            texts.append(list(PROMPTS[5]))
            decoder.add(texts[-1])
        new = [(31 * turn + 7 * row) % 400 for row in range(len(texts))]
        logits = decoder.step(new)
        for text, token, ours in zip(texts, new, logits, strict=True):
            text.append(token)
            full = model.gather_logits(model(torch.tensor([text])))[0, -1]
            torch.testing.assert_close(ours, full, rtol=1e-4, atol=1e-4)


def test_room_grows_without_forgetting(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlm_cli.generation.slots._FIRST_CAPACITY", 2)
    small = answers(model, encoded(PROMPTS), slots=2, temperature=0, max_new_tokens=30)
    monkeypatch.undo()
    assert small == answers(model, encoded(PROMPTS), slots=2, temperature=0, max_new_tokens=30)


@pytest.mark.parametrize("slots", [2, 4, 16])
def test_an_answer_does_not_depend_on_the_batch(model: Any, slots: int) -> None:
    options: dict[str, Any] = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 3, "max_new_tokens": 24}
    assert answers(model, encoded(PROMPTS), slots=slots, **options) == answers(model, encoded(PROMPTS), **options)


def test_another_seed_or_number_is_another_answer(model: Any) -> None:
    prompts = encoded([PROMPTS[0], PROMPTS[0]])
    first = answers(model, prompts, temperature=1.0, seed=1, max_new_tokens=24)
    assert first[0].tokens != first[1].tokens
    assert first != answers(model, prompts, temperature=1.0, seed=2, max_new_tokens=24)
    assert first == answers(model, prompts, temperature=1.0, seed=1, max_new_tokens=24)


def test_a_stop_string_over_tokens_ends_the_answer_before_it(model: Any) -> None:
    whole = answers(model, encoded(PROMPTS[:1]), temperature=0, max_new_tokens=20)[0]
    third, fourth = whole.tokens[2:4]
    answer = answers(model, encoded(PROMPTS[:1]), temperature=0, max_new_tokens=20, stops=(f"{third} {fourth}",))[0]
    assert answer.finish_reason == "stop"
    assert answer.tokens == whole.tokens[:4]
    assert answer.text == "".join(f"{token} " for token in whole.tokens[:2])


def test_the_answer_ends_where_the_context_does(pair: Pair, model: Any) -> None:
    long = list(range(1, 91))
    answer = answers(model, encoded([long]), temperature=0, max_new_tokens=50, end_ids=frozenset())[0]
    assert answer.finish_reason == "context"
    # The last token is chosen after a full context and never read itself.
    assert len(long) + len(answer.tokens) == 96 + 1
    theirs = pair.model.generate(
        torch.tensor([long]), do_sample=False, max_new_tokens=7, pad_token_id=0, eos_token_id=-1
    )[0, 90:].tolist()
    assert answer.tokens == theirs


def test_the_end_of_document_is_no_text(model: Any) -> None:
    whole = answers(model, encoded(PROMPTS[:1]), temperature=0, max_new_tokens=20, end_ids=frozenset())[0]
    end = whole.tokens[5]
    cut = whole.tokens.index(end)
    answer = answers(model, encoded(PROMPTS[:1]), temperature=0, max_new_tokens=20, end_ids=frozenset({end}))[0]
    assert (answer.finish_reason, answer.tokens) == ("eod", whole.tokens[:cut])


def test_pieces_shown_are_the_answer_and_an_interruption_keeps_it(model: Any) -> None:
    shown: list[str] = []
    generator = Generator(
        Decoder(model),
        Settings(Sampling(temperature=0), 50, end_ids=frozenset()),
        Numbers,
        show=lambda _prompt, piece: shown.append(piece),
        interrupted=lambda _prompt: len(shown) >= 5,
    )
    answer = next(generator.answers(encoded(PROMPTS[:1])))
    assert answer.finish_reason == "interrupted"
    assert "".join(shown) == answer.text and len(answer.tokens) == 6


def test_answers_come_in_order_and_prompts_are_taken_as_needed(model: Any) -> None:
    """A long answer in front holds back the others, and no more prompts are read than there are rows."""
    taken: list[int] = []

    def source() -> Any:
        for item in encoded(PROMPTS):
            taken.append(item.prompt.number)
            yield item

    generator = Generator(Decoder(model, 2), Settings(Sampling(temperature=0), 10), Numbers)
    stream = generator.answers(source())
    first = next(stream)
    assert first.prompt.number == 0 and len(taken) < len(PROMPTS)
    assert [answer.prompt.number for answer in stream] == list(range(1, len(PROMPTS)))


def test_continuing_reads_only_what_is_new(model: Any) -> None:
    """Two turns over one kept row equal one fresh text."""
    settings = Settings(Sampling(temperature=0), 6, end_ids=frozenset())
    decoder = Decoder(model)
    generator = Generator(decoder, settings, Numbers)
    text = list(PROMPTS[0])
    prompt = encoded([text])[0]
    text += generator.continue_text(prompt, 0, 0).tokens + PROMPTS[3]
    known = decoder.length(0)
    assert known == len(PROMPTS[0]) + 5
    second = generator.continue_text(encoded([text])[0], 0, known)
    assert (
        second.tokens == answers(model, encoded([text]), temperature=0, max_new_tokens=6, end_ids=frozenset())[0].tokens
    )


def test_settings_out_of_range() -> None:
    with pytest.raises(UsageError, match="max-new-tokens 0"):
        Settings(Sampling(), 0)
    with pytest.raises(UsageError, match="empty stop"):
        Settings(Sampling(), stops=("",))
