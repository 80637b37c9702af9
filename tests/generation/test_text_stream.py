"""Streamed text is the text, and never half a character."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mlm_cli.data.tokenizer import Tokenizer, load_tokenizer
from mlm_cli.generation.text_stream import ByteStream, WindowStream, text_stream

TEXT = "Grüße, 東京! 🙂👩‍👩‍👧 naïve “quotes” — e\u0301 \t\n  two  blanks ½ мир"


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = text_stream(tokenizer)
    return [*(stream.feed(token) for token in ids), stream.flush()]


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    return load_tokenizer("bytes")


def test_single_bytes_make_whole_characters(byte_tokenizer: Tokenizer) -> None:
    """The hardest case: every character of several bytes is cut between tokens."""
    shown = pieces(byte_tokenizer, byte_tokenizer.encode(TEXT))
    assert "".join(shown) == TEXT
    assert not any("\ufffd" in piece for piece in shown)
    assert [piece for piece in shown if piece] == list(TEXT)


def test_broken_bytes_give_what_decoding_at_once_gives(byte_tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    alphabet = [i for i in range(byte_tokenizer.vocab_size) if byte_tokenizer.token_bytes(i) is not None]
    for _ in range(300):
        ids = draw.choices(alphabet, k=draw.randint(1, 12))
        assert "".join(pieces(byte_tokenizer, ids)) == byte_tokenizer.decode(ids, skip_special=True)


def test_a_special_token_is_no_text_and_breaks_no_character(byte_tokenizer: Tokenizer) -> None:
    assert byte_tokenizer.eod_id is not None
    first, second, third = byte_tokenizer.encode("東")
    assert "".join(pieces(byte_tokenizer, [first, second, byte_tokenizer.eod_id, third])) == "東"


def test_gpt2(test_data: Path) -> None:
    tokenizer = load_tokenizer(test_data / "tokenizers" / "gpt2")
    assert isinstance(text_stream(tokenizer), ByteStream)
    shown = pieces(tokenizer, tokenizer.encode(TEXT))
    assert "".join(shown) == TEXT and not any("\ufffd" in piece for piece in shown)


@pytest.mark.parametrize("name", ["bert-base-cased", "sentencepiece"])
def test_tokenizers_that_look_to_the_left(test_data: Path, name: str) -> None:
    folder = test_data / "tokenizers" / name
    models = sorted(folder.glob("**/*.model"))
    tokenizer = load_tokenizer(models[0] if models else folder)
    assert isinstance(text_stream(tokenizer), WindowStream)
    draw = random.Random(1)
    texts = [tokenizer.encode("The unaffordable house, in Tokyo's suburbs, isn't  unbelievable.")]
    texts += [draw.choices(range(5, tokenizer.vocab_size), k=20) for _ in range(20)]
    for ids in texts:
        shown = pieces(tokenizer, ids)
        assert "".join(shown) == tokenizer.decode(ids, skip_special=True)
        assert len([piece for piece in shown if piece]) > len(ids) // 3, "the text must come in pieces"
