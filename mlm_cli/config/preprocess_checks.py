"""Checks of the `preprocess` section that need more than one key."""

from __future__ import annotations

from collections.abc import Iterator

from mlm_cli.config.clean_section import CleanSection
from mlm_cli.config.mistakes import Mistake
from mlm_cli.config.schema import Recipe

_SECTION = "preprocess.clean"


def check_preprocess(recipe: Recipe) -> Iterator[Mistake]:
    """Settings that contradict each other, and those that would do nothing."""
    clean = recipe.preprocess.clean
    yield from _words(clean)
    yield from _without_effect(clean)
    others = [language for language in clean.languages if language != "en"]
    if clean.gopher_quality and others:
        yield Mistake(
            (f"{_SECTION}.gopher_quality", f"{_SECTION}.languages"),
            f"`{_SECTION}.gopher_quality` demands English stop words, and `{_SECTION}.languages` has `{others[0]}`",
            f"use `{_SECTION}.languages=[en]`, or `{_SECTION}.gopher_quality=false` with "
            f"`{_SECTION}.gopher_repetition=true`, whose rules hold in any language written with spaces",
        )


def _words(clean: CleanSection) -> Iterator[Mistake]:
    low, high = clean.word_range
    if low is not None and high is not None and low > high:
        unset = "min_words" if clean.min_words is None else "max_words" if clean.max_words is None else None
        why = f" (`{_SECTION}.{unset}` is unset: Gopher's)" if unset else ""
        yield Mistake(
            (f"{_SECTION}.min_words", f"{_SECTION}.max_words"),
            f"no document has at least {low:,} and at most {high:,} words{why}",
            f"set both `{_SECTION}.min_words` and `{_SECTION}.max_words`, the first the smaller one",
        )


def _without_effect(clean: CleanSection) -> Iterator[Mistake]:
    """Keys of something that was not asked for: more likely a mistake than meant."""
    needs = {
        "min_language_probability": (bool(clean.languages), "languages=[en]"),
        "decontaminate_ngram": (bool(clean.decontaminate), "decontaminate=[FILE]"),
        "phone_regions": (clean.pii != "none", "pii=redact"),
        "jaccard_threshold": (clean.deduplicate == "near", "deduplicate=near"),
        "shingle_words": (clean.deduplicate == "near", "deduplicate=near"),
        "num_permutations": (clean.deduplicate == "near", "deduplicate=near"),
    }
    for key, (asked_for, setting) in needs.items():
        if not asked_for and getattr(clean, key) != CleanSection.model_fields[key].default:
            yield Mistake(
                (f"{_SECTION}.{key}",),
                f"`{_SECTION}.{key}` does nothing without `{_SECTION}.{setting.partition('=')[0]}`",
                f"add `{_SECTION}.{setting}`, or leave it out",
            )
