"""What written texts are worth beside those that were to be written: BLEU, chrF, ROUGE, words in common.

BLEU (Papineni et al. 2002) and chrF (Popovic 2015) are sacrebleu's (Post 2018), ROUGE (Lin 2004) is rouge-score's, the
package of Google Research; both are in the extra ``eval``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from mlm_cli import log
from mlm_cli.errors import UsageError
from mlm_cli.tasks.squad import answer_f1, normalize_answer

_IDEOGRAPHS = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")  # written without spaces


@dataclass(frozen=True)
class TextScores:
    """More is better in each of ``metrics``; ``stderr`` where known; ``facts``: how they were made."""

    metrics: Mapping[str, float]
    stderr: Mapping[str, float | None] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


# scorer(texts, references of each, one or more) -> scores
Scorer = Callable[[Sequence[str], Sequence[Sequence[str]]], TextScores]


def bleu_and_chrf(tokenize: str) -> Scorer:
    """Of a whole file, 0 to 100; their signatures among the facts.

    Args:
        tokenize: sacrebleu's way to cut words.

    Raises:
        UsageError: sacrebleu is missing.
    """
    metrics = _package("sacrebleu.metrics", "sacrebleu")
    bleu, chrf = metrics.BLEU(tokenize=tokenize), metrics.CHRF()

    def score(texts: Sequence[str], references: Sequence[Sequence[str]]) -> TextScores:
        most = max(map(len, references))
        # sacrebleu takes the first reference of every text, then the second, with None where there is none.
        streams = [[gold[place] if place < len(gold) else None for gold in references] for place in range(most)]
        found = {"bleu": bleu.corpus_score(texts, streams).score, "chrf": chrf.corpus_score(texts, streams).score}
        return TextScores(found, facts={"bleu_signature": str(bleu.get_signature()),
                                        "chrf_signature": str(chrf.get_signature())})  # fmt: skip

    return score


def rouge(tokenize: str) -> Scorer:
    """F-measures of single words, pairs of them and longest common subsequences, with Porter's stemmer; means, 0 to 1.

    Of several references the one with the best F-measure counts. ``rougeLsum`` takes each line as a sentence.

    Args:
        tokenize: ``ascii`` is rouge-score's own way, which knows no letters but a to z (and warns of others here);
            ``unicode`` takes letters, marks and digits of any script, Chinese and Japanese characters one by one.

    Raises:
        UsageError: rouge-score is missing.
    """
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    package = _package("rouge_score.rouge_scorer", "rouge-score")
    words = _Words(import_module("nltk.stem.porter").PorterStemmer()) if tokenize == "unicode" else None
    scorer = package.RougeScorer(kinds, use_stemmer=True, tokenizer=words)
    looked = False

    def score(texts: Sequence[str], references: Sequence[Sequence[str]]) -> TextScores:
        nonlocal looked
        if words is None and not looked:
            looked = True
            _warn_of_other_letters("".join(text for gold in references for text in gold))
        each = [scorer.score_multi(gold, text) for text, gold in zip(texts, references, strict=True)]
        return _means({kind: [found[kind].fmeasure for found in each] for kind in kinds}, {"stemmer": "porter"})

    return score


def _warn_of_other_letters(text: str) -> None:
    letters = list(filter(str.isalpha, text))
    share = sum(not letter.isascii() for letter in letters) / max(1, len(letters))
    if share > 0.01:
        log.warn(
            f"rouge-score knows no letters but a to z: it passes over {share:.0%} of those in the references; "
            "task.rouge_tokenize=unicode takes them all"
        )


class _Words:
    """A tokenizer for rouge-score: words of any script, stemmed as it stems them (those of four letters and more)."""

    def __init__(self, stemmer: Any) -> None:
        self._stemmer = stemmer

    def tokenize(self, text: str) -> list[str]:
        spaced = (
            f" {character} " if _IDEOGRAPHS.match(character)
            else character if unicodedata.category(character)[0] in "LMN"
            else " "
            for character in unicodedata.normalize("NFKC", text).lower()
        )  # fmt: skip
        return [self._stemmer.stem(word) if len(word) > 3 else word for word in "".join(spaced).split()]


def answer_scores() -> Scorer:
    """F1 over words and exact match of normalised texts (Rajpurkar et al. 2016, section 6.1); means, 0 to 1."""

    def score(texts: Sequence[str], references: Sequence[Sequence[str]]) -> TextScores:
        pairs = list(zip(texts, references, strict=True))
        return _means(
            {
                "f1": [max(answer_f1(text, gold) for gold in golds) for text, golds in pairs],
                "exact_match": [
                    float(normalize_answer(text) in {normalize_answer(gold) for gold in golds}) for text, golds in pairs
                ],
            }
        )

    return score


def _means(each: Mapping[str, Sequence[float]], facts: Mapping[str, Any] | None = None) -> TextScores:
    errors = {name: float(np.std(v, ddof=1)) / len(v) ** 0.5 if len(v) > 1 else None for name, v in each.items()}
    return TextScores({name: float(np.mean(values)) for name, values in each.items()}, errors, facts or {})


def _package(module: str, name: str) -> ModuleType:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"scoring these texts needs the package `{name}` (missing: {error.name})",
            hint="pip install 'mlm-cli[eval]'",
        ) from None
