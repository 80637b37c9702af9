"""Whether texts carry a watermark: more green tokens than chance would have.

Kirchenbauer et al. 2023, A Watermark for Large Language Models, section 4: without the key a token is green with
probability ``ratio``, so that the number of green ones among ``T`` has the z-score ``(green - ratio T) / sqrt(ratio
(1 - ratio) T)``, as in transformers' ``WatermarkDetector``. Runs of tokens that come again count once (section 4.1):
what is quoted over and over is no evidence over and over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlm_cli.errors import DataError
from mlm_cli.evaluation.documents import files_of, located_texts
from mlm_cli.evaluation.results import TaskResult, json_lines, standard_error
from mlm_cli.generation.watermark import Watermark, green_lists

VERSION = 1


@dataclass(frozen=True)
class Count:
    """The green tokens of a text: ``green`` of the ``scored``."""

    scored: int
    green: int


@dataclass(frozen=True)
class Detector:
    """When a text counts as marked: where its z-score is larger than ``threshold``."""

    ratio: float
    threshold: float

    def z_score(self, count: Count) -> float | None:
        """None: nothing was scored."""
        if count.scored == 0:
            return None
        return (count.green - self.ratio * count.scored) / math.sqrt(self.ratio * (1 - self.ratio) * count.scored)

    def p_value(self, count: Count) -> float:
        """Chance of so many green tokens, or more, in a text without the mark: the binomial tail itself."""
        scored, green, odds = count.scored, count.green, self.ratio / (1 - self.ratio)
        if green == 0:
            return 1.0
        places = np.arange(green, scored)
        first = math.lgamma(scored + 1) - math.lgamma(green + 1) - math.lgamma(scored - green + 1)
        first += green * math.log(self.ratio) + (scored - green) * math.log1p(-self.ratio)
        terms = first + np.concatenate([[0.0], np.cumsum(np.log((scored - places) / (places + 1) * odds))])
        return min(1.0, float(np.exp(terms).sum()))

    @property
    def least(self) -> int:
        """Tokens that a text needs. Were all of fewer green, chance would do it more often than a z-score of
        ``threshold`` stands for, or that score would be out of reach."""
        chance = max(0.5 * math.erfc(self.threshold / math.sqrt(2)), 5e-324)
        likely = math.ceil(math.log(chance) / math.log(self.ratio))
        return max(likely, math.floor(self.threshold**2 * self.ratio / (1 - self.ratio)) + 1)

    def verdict(self, count: Count) -> str:
        """``watermarked``, ``not found`` or ``too short``."""
        if count.scored < self.least:
            return "too short"
        z = self.z_score(count)
        assert z is not None
        return "watermarked" if z > self.threshold else "not found"


def count_green(ids: Sequence[int], watermark: Watermark, vocab_size: int) -> Count:
    """Look at each run of ``watermark.ngram`` tokens once, however often it comes.

    Args:
        vocab_size: of the model that may have written the text, without padded rows.
    """
    size, lists = watermark.ngram, green_lists(watermark, vocab_size)
    ngrams = {tuple(ids[end - size : end]) for end in range(size, len(ids) + 1)}
    return Count(len(ngrams), sum(map(lists.is_green, ngrams)))


def read_texts_of(paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(where, text) of every text: a line each of ``.jsonl`` (``text``), else a file; also of folders.

    Raises:
        DataError: nothing there, not UTF-8, malformed JSON.
    """
    for path in paths:
        for file in files_of(Path(path)):
            yield from located_texts(file)


def watermark_result(
    counts: Sequence[Count], detector: Detector, *, config: dict[str, object], num_original: int
) -> TaskResult:
    """The entry of ``results.json``, over the texts that are long enough: the share ``detected``, and means.

    Raises:
        DataError: all are too short.
    """
    long = [count for count in counts if count.scored >= detector.least]
    if not long:
        raise DataError(
            f"none of {len(counts)} texts is long enough: {detector.least} different runs of tokens are the least",
            hint="give longer texts, or several as one",
        )
    values = {
        "detected": np.array([detector.verdict(count) == "watermarked" for count in long], dtype=float),
        "green_fraction": np.array([count.green / count.scored for count in long]),
        "z_score": np.array([detector.z_score(count) for count in long], dtype=float),
    }
    return TaskResult(
        name="watermark",
        metrics={name: float(value.mean()) for name, value in values.items()},
        stderr={name: standard_error(value) for name, value in values.items()},
        higher_is_better=dict.fromkeys(values, True),
        config={**config, "num_detected": int(values["detected"].sum()), "num_too_short": len(counts) - len(long)},
        version=VERSION,
        num_samples=len(long),
        num_original=num_original,
    )


def text_records(texts: Sequence[tuple[str, str]], counts: Sequence[Count], detector: Detector) -> str:
    """Every text with what was found in it, as JSON lines."""
    records = (
        {
            "where": where,
            "text": text,
            "num_tokens_scored": count.scored,
            "num_green_tokens": count.green,
            "green_fraction": count.green / count.scored if count.scored else None,
            "z_score": detector.z_score(count),
            "p_value": detector.p_value(count),
            "verdict": detector.verdict(count),
        }
        for (where, text), count in zip(texts, counts, strict=True)
    )
    return json_lines(records)
