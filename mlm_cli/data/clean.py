"""What `preprocess.clean` does to one document: keep it, change it, or say why it goes. Runs in the workers.

Filters are asked in a fixed order, cheap ones first, and the first that a document fails is the one it goes for. All
judge the text as it was read; only then is personal data replaced. Whether the same text was there before is not for a
worker to know: it gives digest and signature, and the main process decides in the order of the input.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from mlm_cli.config.clean_section import CleanSection
from mlm_cli.data import gopher, pii
from mlm_cli.data.decontaminate import TestTexts
from mlm_cli.data.language import language_of
from mlm_cli.data.minhash import MinHash, Signature, bands_for, shingles
from mlm_cli.data.ngrams import Numbers, word_numbers, words_of
from mlm_cli.data.parse import Document, Parsed
from mlm_cli.data.seen import DIGEST_BYTES, document_keys


@dataclass(frozen=True)
class Removal:
    """Why a document goes. ``filter``: the key that asked for it; ``rule``: which one, of several; ``found``: what."""

    filter: str
    rule: str | None
    found: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.filter}.{self.rule}" if self.rule else self.filter


@dataclass
class Cleaning:
    """What cleaning did to a segment.

    ``removed``: (line, why). ``digests``, ``signatures`` [num_permutations] and ``keys`` (`seen.document_keys`) of the
    documents that stay, where duplicates are looked for. ``redacted``: of each document that stays, how many pieces
    were replaced, by kind; where that is asked for.
    """

    removed: list[tuple[int, Removal]] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    signatures: list[Signature] = field(default_factory=list)
    keys: list[Numbers] = field(default_factory=list)
    redacted: list[Counter[str]] = field(default_factory=list)


class Cleaner:
    """Applies a section to documents. ``tests``: what ``section.decontaminate`` names, read."""

    def __init__(self, section: CleanSection, tests: TestTexts | None = None) -> None:
        self.section, self.tests = section, tests
        self._minhash = MinHash(section.num_permutations) if section.deduplicate == "near" else None
        near = (section.jaccard_threshold, section.num_permutations)
        self._bands = bands_for(*near) if self._minhash is not None else (0, 0)
        self._filters: list[Callable[[_Text], Removal | None]] = [self._words]
        if section.gopher_quality or section.gopher_repetition:
            self._filters.append(self._gopher)
        if section.languages:
            self._filters.append(self._language)
        if tests is not None:
            self._filters.append(self._overlap)
        if section.pii == "drop":
            self._filters.append(self._personal)

    def clean(self, parsed: Parsed) -> Cleaning:
        """Judge the documents of a segment, which have one key; takes those that go out of ``parsed``."""
        done = Cleaning()
        [(key, documents)] = parsed.documents.items()
        numbers: list[int] = []
        kept: list[Document] = []
        for number, document in zip(parsed.numbers, documents, strict=True):
            text = _Text(document)
            removal = self.judge(text)
            if removal is not None:
                done.removed.append((number, removal))
                continue
            numbers.append(number)
            kept.append(self._redacted(document, done) if self.section.pii == "redact" else document)
            if self.section.deduplicate != "none":
                done.digests.append(digest(text.text))
                done.signatures.append(self._signature(text))
        parsed.numbers, parsed.documents[key] = numbers, kept
        if done.digests:
            done.keys = document_keys(b"".join(done.digests), np.stack(done.signatures), self._bands)
        return done

    def judge(self, text: _Text) -> Removal | None:
        """The first filter that a document fails; None if it stays."""
        return next((removal for one in self._filters if (removal := one(text)) is not None), None)

    def _words(self, text: _Text) -> Removal | None:
        low, high = self.section.word_range
        if low is None and high is None:
            return None
        count = len(text.words)
        for bound, wrong in (("min_words", low is not None and count < low), ("max_words", high and count > high)):
            if wrong:
                own = getattr(self.section, bound) is not None
                return Removal(bound if own else "gopher_quality", None if own else bound, {"value": count})
        return None

    def _gopher(self, text: _Text) -> Removal | None:
        for name, rules in (("gopher_quality", gopher.quality), ("gopher_repetition", gopher.repetition)):
            if getattr(self.section, name) and (broken := rules(text.text, text.words)) is not None:
                return Removal(name, broken[0], {"value": round(broken[1], 4)})
        return None

    def _language(self, text: _Text) -> Removal | None:
        language, probability = language_of(text.text)
        if language in self.section.languages and probability >= self.section.min_language_probability:
            return None
        return Removal("languages", None, {"value": language, "probability": round(probability, 4)})

    def _overlap(self, text: _Text) -> Removal | None:
        assert self.tests is not None
        shared = self.tests.overlap(text.runs, text.run_numbers)
        return Removal("decontaminate", None, {"value": shared[0], "test_file": shared[1]}) if shared else None

    def _personal(self, text: _Text) -> Removal | None:
        kinds = {span.kind for span in pii.find(text.text, self.section.phone_regions)}
        return Removal("pii", None, {"value": sorted(kinds)}) if kinds else None  # the data themselves stay unsaid

    def _redacted(self, document: Document, done: Cleaning) -> Document:
        pieces: list[str] = []
        counts: Counter[str] = Counter()
        for text in [document] if isinstance(document, str) else document:
            spans = pii.find(text, self.section.phone_regions)
            counts.update(span.kind for span in spans)
            pieces.append(pii.redact(text, spans))
        done.redacted.append(counts)
        return pieces[0] if isinstance(document, str) else pieces

    def _signature(self, text: _Text) -> Signature:
        if self._minhash is None:
            return np.zeros(0, np.uint32)
        return self._minhash.signature(shingles(text.run_numbers, self.section.shingle_words))


class _Text:
    """A document as the filters see it; what several of them want is made once, and only if one asks."""

    def __init__(self, document: Document) -> None:
        self.text = document if isinstance(document, str) else "\n".join(document)

    @cached_property
    def words(self) -> list[str]:
        """Between white space."""
        return self.text.split()

    @cached_property
    def runs(self) -> list[str]:
        """Of letters and digits, in small letters."""
        return words_of(self.text)

    @cached_property
    def run_numbers(self) -> Numbers:
        return word_numbers(self.runs)


def digest(text: str) -> bytes:
    """Of the text in composed form (NFC), each run of white space as one space."""
    plain = " ".join((text if text.isascii() else unicodedata.normalize("NFC", text)).split())
    return hashlib.blake2b(plain.encode(), digest_size=DIGEST_BYTES).digest()
