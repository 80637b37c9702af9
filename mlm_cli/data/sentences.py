"""Text -> sentences by rules that hold in many scripts: no model, no download, and nothing of the text is lost.

A boundary lies after a sentence-final mark (with closing quotes and brackets behind it), and
- for marks of scripts that write no space between sentences (。！？｡ and the like): right there;
- for . ! ? … and marks of other spaced scripts: before white space, if what follows does not start with a small letter
  and the word before is neither an initial nor a common abbreviation. Abbreviations that are words too (sat, no) have
  a capital, or stand before a number.
Thai and Lao write no marks at all, but spaces between sentences and longer clauses: there a space behind twenty letters
without one is a boundary.
A blank line always ends a sentence. Marks are those of Unicode's Sentence_Terminal property (UAX #29), and two that it
leaves out: the question mark of Greek, which looks like a semicolon, and Tibetan's shad, which ends clauses too.
"""

from __future__ import annotations

import re

_TIGHT = "。！？｡．︒﹒﹖﹗"  # written without a space behind
_SPACED = ".!?…‼⁇⁈⁉։؟۔۝܀܁܂߹।॥၊။።፧፨᙮᜵᜶᠃᠉᥄᥅᪨᪩᪪᪫᭚᭛᰻᰼᱾᱿‽⸮⸼꓿꘎꘏꛳꛷꡶꡷꣎꣏꤯꧈꧉꩝꩞꩟꫰꫱꯫།༎"
_CLOSING = "\"'”’»›)]}」』】〉》〕）］｝"
_GREEK = "[\u0370-\u03ff\u1f00-\u1fff]"
_NO_MARKS = "[\u0e00-\u0eff]"  # Thai and Lao
_BOUNDARY = re.compile(
    rf"(?P<tight>[{_TIGHT}]+[{re.escape(_CLOSING)}]*)\s*"
    rf"|(?P<spaced>(?:[{re.escape(_SPACED)}]|(?<={_GREEK})[;\u037e])+[{re.escape(_CLOSING)}]*)(?:\s+|$)"
    rf"|(?P<clause>(?<={_NO_MARKS}{{20}})\s+(?={_NO_MARKS}))"
    r"|(?P<blank>[^\S\n]*\n[^\S\n]*\n\s*)"
)
_LAST_WORD = re.compile(r"[^\s(\[{\"“‘'«]*$")
_SHORT = """
mr mrs ms dr prof rev hon st sr jr vs etc cf e.g i.e al fig figs eq no nos vol vols pp p ch sec op inc ltd co corp
gen col sgt capt lt cmdr gov sen rep pres jan feb mar apr jun jul aug sep sept oct nov dec mon tue wed thu fri sat
sun approx dept est min max ave blvd rd mt ft bzw usw z.b d.h u.a ca nr str hr hrsg bd mme mlle sra srta ud uds
"""
_ABBREVIATIONS = frozenset(_SHORT.split())
_WORDS_TOO = frozenset(["sat", "sun", "wed", "mar", "gen", "rep", "op", "co", "min", "max"])  # abbreviated: a capital
_OF_NUMBERS = frozenset(["no", "nos", "fig", "figs"])  # abbreviations before a number, else words


def split_sentences(text: str) -> list[str]:
    """Sentences of ``text`` without the white space between them; empty for blank text."""
    sentences: list[str] = []
    start = 0
    for mark in _BOUNDARY.finditer(text):
        if mark.group("spaced") is not None and not _ends_sentence(text, start, mark):
            continue
        if mark.group("tight") is not None and _goes_on(text, mark):
            continue
        piece = text[start : mark.end()].strip()
        if piece:
            sentences.append(piece)
        start = mark.end()
    rest = text[start:].strip()
    return [*sentences, rest] if rest else sentences


def _ends_sentence(text: str, start: int, mark: re.Match[str]) -> bool:
    following = text[mark.end() : mark.end() + 1]
    # Georgian is written without capitals, though Unicode calls its letters small ones
    if following.islower() and not "\u10d0" <= following <= "\u10ff":
        return False
    marks = mark.group("spaced")
    if not marks.startswith(".") or marks.startswith(".."):
        return True
    found = _LAST_WORD.search(text, max(start, mark.start() - 40), mark.start())
    word = found.group() if found else ""
    if len(word) == 1 and word.isupper() and word not in "I":
        return False  # an initial: J. Smith
    short = word.lower()
    if short in _OF_NUMBERS:
        return not following.isdigit()
    return short not in _ABBREVIATIONS or (short in _WORDS_TOO and word.islower() and not following.isdigit())


def _goes_on(text: str, mark: re.Match[str]) -> bool:
    """True inside a sentence that quotes another one: 「何だ？」と言った。"""
    quoted = mark.group("tight")[-1] in _CLOSING
    following = text[mark.end() : mark.end() + 1]
    return quoted and mark.end() == mark.end("tight") and bool(following) and following not in "「『（“‘《"
