"""Stop strings across token borders, whatever the borders."""

from __future__ import annotations

import random

import pytest

from mlm_cli.errors import UsageError
from mlm_cli.generation.stopping import StopScanner


def scan(pieces: list[str], stops: list[str]) -> tuple[list[str], str | None]:
    scanner = StopScanner(stops)
    shown = [scanner.feed(piece) for piece in pieces]
    if scanner.found is None:
        shown.append(scanner.flush())
    return shown, scanner.found


def test_a_stop_string_over_three_tokens_is_never_shown_in_part() -> None:
    shown, found = scan(["one <", "|en", "d|> two"], ["<|end|>"])
    assert shown == ["one ", "", ""] and found == "<|end|>"


def test_a_false_start_is_shown_as_soon_as_it_is_one() -> None:
    shown, found = scan(["a<|", "en", "ough"], ["<|end|>"])
    assert shown == ["a", "", "<|enough", ""] and found is None


def test_text_held_back_at_the_end_is_not_lost() -> None:
    assert scan(["abc\n"], ["\n\n"]) == (["abc", "\n"], None)


def test_nothing_comes_after_a_match() -> None:
    scanner = StopScanner(["."])
    assert [scanner.feed("a.b"), scanner.feed("c"), scanner.flush()] == ["a", "", ""]


def test_no_stop_strings_hold_nothing_back() -> None:
    assert scan(["a", "b"], []) == (["a", "b", ""], None)


def test_the_outcome_does_not_depend_on_token_borders() -> None:
    """Random texts over two letters with overlapping stop strings, cut at random: as if fed letter by letter."""
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(draw.choices("ab", k=draw.randint(0, 14)))
        stops = ["".join(draw.choices("ab", k=draw.randint(1, 5))) for _ in range(draw.randint(1, 3))]
        matches = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        expected = text[: min(matches)[1]] if matches else text
        cuts = sorted(draw.randint(0, len(text)) for _ in range(3))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        shown, found = scan(pieces, stops)
        assert "".join(shown) == expected
        assert (found is not None) == bool(matches)


def test_an_empty_stop_string_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="empty stop"):
        StopScanner(["a", ""])
