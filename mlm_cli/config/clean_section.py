"""What `mlm preprocess` leaves out and takes out of documents."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from mlm_cli.config.section import Section

# Words that Gopher's rule counts in place of what `min_words` and `max_words` leave open.
GOPHER_WORDS = (50, 100_000)
Language = Annotated[str, StringConstraints(pattern=r"^[a-z]{2,3}$")]
Region = Annotated[str, StringConstraints(pattern=r"^[A-Z]{2}$")]


class CleanSection(Section):
    """Documents to leave out, and personal data to take out; nothing unless it is asked for.

    A word is what stands between white space in `min_words`, `max_words` and Gopher's rules, and a run of letters and
    digits, in small letters, for near duplicates and test sets.
    """

    min_words: int | None = Field(default=None, ge=0, description="shorter documents go")
    max_words: int | None = Field(default=None, ge=1, description="longer documents go")
    gopher_quality: bool = Field(
        default=False, description="rules on words, symbols, lines and English stop words (Rae et al. 2021, A.1.1)"
    )
    gopher_repetition: bool = Field(
        default=False, description="rules on repeated lines, paragraphs and n-grams (Rae et al. 2021, table A1)"
    )
    languages: tuple[Language, ...] = Field(default=(), description="keep these alone (ISO 639-1); needs py3langid")
    min_language_probability: float = Field(default=0.5, ge=0, le=1, description="of the likeliest language")
    decontaminate: tuple[str, ...] = Field(
        default=(), description="test files (.jsonl, .txt ...): documents that share an n-gram with them go"
    )
    decontaminate_ngram: int = Field(default=13, ge=2, le=100, description="words (13: GPT-3)")
    pii: Literal["none", "redact", "drop"] = Field(
        default="none",
        description="e-mail and IP addresses, telephone, card, account (IBAN) and US social security numbers: replaced"
        " by tags such as <EMAIL_ADDRESS>, or the document goes",
    )
    phone_regions: tuple[Region, ...] = Field(
        default=("US", "GB"),
        description="countries whose telephone numbers are found without +NN too; needs phonenumbers; []: no numbers",
    )
    deduplicate: Literal["none", "exact", "near"] = Field(
        default="none",
        description="exact: texts equal but for white space, the first stays; near: MinHash of shingles too",
    )
    jaccard_threshold: float = Field(
        default=0.8, gt=0, lt=1, description="near: share of shingles in common that makes a duplicate"
    )
    shingle_words: int = Field(default=5, ge=1, le=100, description="near: words in a shingle")
    num_permutations: int = Field(
        default=128, ge=16, le=1024, description="near: numbers in a signature; more: surer and slower"
    )

    @property
    def active(self) -> bool:
        """Is anything asked for?"""
        words = self.min_words is not None or self.max_words is not None
        lists = bool(self.languages or self.decontaminate)
        modes = self.pii != "none" or self.deduplicate != "none"
        return words or lists or modes or self.gopher_quality or self.gopher_repetition

    @property
    def word_range(self) -> tuple[int | None, int | None]:
        """Fewest and most words of a document; Gopher's where its rules are asked for and nothing else is said."""
        low, high = GOPHER_WORDS if self.gopher_quality else (None, None)
        return (
            self.min_words if self.min_words is not None else low,
            self.max_words if self.max_words is not None else high,
        )
