"""The language of a text, by `py3langid` (Lui and Baldwin 2012): a model of byte n-grams that comes in its wheel."""

from __future__ import annotations

from functools import cache
from typing import Any

from mlm_cli.errors import UsageError

_CHARACTERS = 2000  # read of a text, from its start: enough to be sure, and as much work for a book as for a letter


@cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ModuleNotFoundError:
        raise UsageError(
            "`preprocess.clean.languages` needs the package `py3langid`, which is not installed",
            hint="pip install 'mlm-cli[data]'",
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def check_languages(languages: tuple[str, ...]) -> None:
    """Is the model there, and does it know these languages (ISO 639-1)?

    Raises:
        UsageError: not so.
    """
    known = sorted(map(str, _identifier().labels))
    for language in languages:
        if language not in known:
            raise UsageError(
                f"`preprocess.clean.languages`: `{language}` is none of the {len(known)} languages that are known",
                hint=f"these are: {' '.join(known)}",
            )


def language_of(text: str) -> tuple[str, float]:
    """(code, probability) of the likeliest language of the first 2,000 characters; `und`, 0 for a blank text."""
    if not text or text.isspace():
        return "und", 0.0
    language, probability = _identifier().classify(text[:_CHARACTERS])
    return str(language), float(probability)
