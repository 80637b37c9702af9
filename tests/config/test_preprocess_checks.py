"""Settings of cleaning that contradict each other or do nothing: all told at once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mlm_cli.config.clean_section import CleanSection
from mlm_cli.config.resolve import resolve_recipe
from mlm_cli.errors import UsageError


def clean(*settings: str, verb: str = "preprocess") -> CleanSection:
    return resolve_recipe(None, [f"preprocess.clean.{setting}" for setting in settings], verb=verb).preprocess.clean


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["min_words=10", "max_words=9"], "at least 10 and at most 9 words"),
        (
            ["gopher_quality=true", "max_words=49"],
            r"at least 50 and at most 49 words \(`preprocess.clean.min_words` is",
        ),
        (["gopher_quality=true", "min_words=200000"], r"at most 100,000 words \(`preprocess.clean.max_words` is unset"),
        (["gopher_quality=true", "languages=[en, de]"], "demands English stop words, and .* has `de`"),
        (["jaccard_threshold=0.7"], "`preprocess.clean.jaccard_threshold` does nothing without"),
        (["deduplicate=exact", "shingle_words=3"], "`preprocess.clean.shingle_words` does nothing without"),
        (["decontaminate_ngram=8"], "does nothing without `preprocess.clean.decontaminate`"),
        (["phone_regions=[US]"], "does nothing without `preprocess.clean.pii`"),
        (["min_language_probability=0.9"], "does nothing without `preprocess.clean.languages`"),
        (["pii=mask"], "`preprocess.clean.pii` must be one of"),
        (["languages=[English]"], "preprocess.clean.languages"),
        (["phone_regions=[usa]", "pii=drop"], "preprocess.clean.phone_regions"),
        (["deduplicate=near", "jaccard_threshold=1.0"], "preprocess.clean.jaccard_threshold"),
        (["dedup=near"], "did you mean `preprocess.clean.deduplicate`"),
    ],
)
def test_mistakes(settings: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        clean(*settings)
    assert re.search(message, f"{error.value.message} {error.value.hint}")


def test_all_at_once() -> None:
    with pytest.raises(UsageError) as error:
        clean("min_words=3", "max_words=2", "num_permutations=64", "gopher_quality=true", "languages=[fr]")
    assert error.value.message.startswith("3 mistakes")
    with pytest.raises(UsageError) as error:
        clean("min_words=3", "max_words=2", "dedup=near", "pii=mask")
    assert error.value.message.startswith("3 mistakes")  # a wrong key does not hide what is wrong with the others


@pytest.mark.parametrize(
    "settings",
    [
        ["deduplicate=near", "jaccard_threshold=0.7", "shingle_words=13", "num_permutations=256"],
        ["gopher_quality=true", "min_words=1", "max_words=10", "languages=[en]"],
        ["pii=drop", "phone_regions=[]"],
        ["min_words=5", "max_words=5"],
    ],
)
def test_what_goes_together(settings: list[str]) -> None:
    assert clean(*settings).active


def test_other_verbs_do_not_look() -> None:
    assert clean("jaccard_threshold=0.7", verb="generate").jaccard_threshold == 0.7


def test_nothing_is_cleaned_unless_asked_for() -> None:
    assert not CleanSection().active and not clean().active
    assert CleanSection().word_range == (None, None)
    assert CleanSection(gopher_quality=True).word_range == (50, 100_000)
    assert CleanSection(gopher_quality=True, min_words=0).word_range == (0, 100_000)


def test_test_files_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert clean("decontaminate=[a.jsonl, /b.txt]").decontaminate == (str(tmp_path / "a.jsonl"), "/b.txt")
