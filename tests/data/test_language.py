"""Languages of real texts, one of each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("py3langid")

from mlm_cli.data.language import check_languages, language_of
from mlm_cli.errors import UsageError

# Codes of the files of the Universal Declaration of Human Rights -> ISO 639-1
FILES = """
amh:am arb:ar ben:bn ces:cs cmn_hans:zh cmn_hant:zh dan:da deu:de ell_monotonic:el eng:en fin:fi fra:fr heb:he hin:hi
hun:hu hye:hy ind:id ita:it jpn:ja kat:ka kor:ko nld:nl nob:no pes_1:fa pol:pl por_PT:pt rus:ru spa:es swe:sv swh:sw
tam:ta tha:th tur:tr ukr:uk vie:vi
"""
CODES = dict(re.findall(r"(\w+):(\w+)", FILES))


def test_thirty_five_languages(test_data: Path) -> None:
    files = sorted((test_data / "corpora/multilingual/udhr2").glob("*.txt"))
    assert {file.stem for file in files} == set(CODES)
    paragraphs = right = 0
    for file in files:
        text = file.read_text(encoding="utf-8-sig")
        if file.stem != "ind":  # its beginning is taken for Malay, which is nearly the same
            assert language_of(text)[0] == CODES[file.stem]
        for start in range(0, len(text), 300):
            if len(piece := text[start : start + 300]) == 300:
                paragraphs += 1
                right += language_of(piece)[0] == CODES[file.stem]
    assert paragraphs > 1300 and right / paragraphs > 0.98


def test_only_the_beginning_is_read() -> None:
    english = "The quick brown fox jumps over the lazy dog and runs into the forest. " * 40
    assert len(english) > 2000
    assert language_of(english + "Здравствуйте, меня зовут Иван. " * 500) == language_of(english[:2000])


def test_a_blank_text_has_none() -> None:
    assert language_of("") == language_of(" \n") == ("und", 0.0)


def test_unknown_language() -> None:
    check_languages(("en", "de"))
    with pytest.raises(UsageError, match="`xx` is none of the"):
        check_languages(("en", "xx"))
