"""Which of two sentences a model finds likelier: the one that goes by a stereotype, or the other.

CrowS-Pairs (Nangia et al. 2020): sentences that differ only in the group of people they speak of. A causal model scores
a sentence by its log-likelihood (as lm-evaluation-harness does), a masked one by its pseudo-log-likelihood over the
tokens that both sentences have, each hidden in turn (section 3, as in the authors' ``metric.py``).
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlm_cli.data.special_tokens import bert_tokens
from mlm_cli.data.tokenizer import Tokenizer
from mlm_cli.errors import DataError, NumericsError
from mlm_cli.evaluation.documents import Document
from mlm_cli.evaluation.masked_words import HiddenToken, MaskedModel, hidden_losses
from mlm_cli.evaluation.perplexity import ScoringModel, score_documents
from mlm_cli.evaluation.results import TaskResult, json_lines, standard_error
from mlm_cli.tasks.labelled_text import opened_text

VERSION = 1
_DIRECTIONS = ("stereo", "antistereo")
_COLUMNS = ("sent_more", "sent_less", "stereo_antistereo", "bias_type")
OnBatch = Callable[[int, int], None]


@dataclass(frozen=True)
class Pair:
    """Two sentences, one ``more`` and one ``less`` stereotypical.

    Attributes:
        direction: ``stereo``: ``more`` shows a stereotype of a disadvantaged group; ``antistereo``: ``less`` violates
            one. The other sentence of each is the same about another group.
        kind: of bias (``race-color``, ``gender``, ...).
        where: file and line, for errors and for the record.
    """

    more: str
    less: str
    direction: str
    kind: str
    where: str


def read_pairs(path: str) -> list[Pair]:
    """Pairs of a ``.csv`` file with the columns of the published one (also ``.gz``, ``.zst``).

    Raises:
        DataError: no such file, not UTF-8, a column or a sentence missing, an unknown direction.
    """
    with opened_text(Path(path)) as text:
        rows = csv.DictReader(text, strict=True)
        try:
            return list(_pairs(rows, path))
        except csv.Error as error:
            raise DataError(f"{path}:{rows.line_num + 1} is malformed: {error}") from None


def _pairs(rows: csv.DictReader[str], path: str) -> Iterator[Pair]:
    missing = [name for name in _COLUMNS if name not in (rows.fieldnames or ())]
    if missing:
        raise DataError(
            f"{path} has no column {', '.join(missing)}", hint="it is to be crows_pairs_anonymized.csv, as published"
        )
    count = 0
    for row in rows:
        more, less, direction, kind = ((row[name] or "").strip() for name in _COLUMNS)
        where = f"{path}:{rows.line_num}"
        if not more or not less or not kind:
            raise DataError(f"{where} lacks a sentence or a kind of bias")
        if direction not in _DIRECTIONS:
            raise DataError(f"{where}: stereo_antistereo is `{direction}`, not {' or '.join(_DIRECTIONS)}")
        yield Pair(more, less, direction, kind, where)
        count += 1
    if not count:
        raise DataError(f"{path} holds no pairs")


def causal_scores(
    model: ScoringModel,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    *,
    length: int,
    prefix: int | None,
    batch_size: int,
    on_batch: OnBatch | None = None,
) -> np.ndarray:
    """Log-likelihoods in nats, ``[pairs, 2]``: of ``more`` and of ``less``. All ranks call; data ranks share them.

    Args:
        length: tokens of context.
        prefix: see ``score_documents``.
    """
    texts = [text for pair in pairs for text in (pair.more, pair.less)]
    documents = [Document(np.array(ids, dtype=np.int64), None, None) for ids in tokenizer.encode_batch(texts)]
    tally = score_documents(model, documents, length=length, prefix=prefix, batch_size=batch_size, on_batch=on_batch)
    return -np.bincount(tally.document, tally.nll, len(texts)).reshape(-1, 2)


def masked_scores(
    model: MaskedModel,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    *,
    length: int,
    batch_size: int,
    on_batch: OnBatch | None = None,
) -> np.ndarray:
    """Pseudo-log-likelihoods in nats, ``[pairs, 2]``, of the tokens that the two sentences of a pair have in common.

    All ranks call; data ranks share the sentences.

    Args:
        length: tokens that the model reads at most.
        batch_size: copies of sentences, with a token hidden in each, that are read at once.

    Raises:
        DataError: a sentence too long for the model; a tokenizer without BERT's special tokens.
    """
    special = bert_tokens(tokenizer)
    encoded = tokenizer.encode_batch([text for pair in pairs for text in (pair.more, pair.less)])
    shared = [places for more, less in zip(encoded[::2], encoded[1::2], strict=True) for places in common(more, less)]
    rows, owners = [], []
    for number, (ids, places) in enumerate(zip(encoded, shared, strict=True)):
        row = (special.cls, *ids, special.sep)
        rows += [HiddenToken(row, place + 1, ids[place], pairs[number // 2].where) for place in places]
        owners += [number] * len(places)
    losses = hidden_losses(
        model, rows, mask=special.mask, length=length, batch_size=batch_size, on_batch=on_batch
    )  # fmt: skip
    return -np.bincount(owners, losses, len(encoded)).reshape(-1, 2)


def common(more: Sequence[int], less: Sequence[int]) -> tuple[list[int], list[int]]:
    """Places of the tokens that two sentences have in common, in each of them, as difflib matches them."""
    blocks = difflib.SequenceMatcher(None, more, less).get_matching_blocks()
    return (
        [block.a + at for block in blocks for at in range(block.size)],
        [block.b + at for block in blocks for at in range(block.size)],
    )


def bias_result(
    pairs: Sequence[Pair], scores: np.ndarray, *, config: dict[str, object], num_original: int
) -> TaskResult:
    """The audit's entry of ``results.json``: shares of pairs whose ``more`` is likelier; 0.5 is no preference.

    ``pct_stereotype`` and ``likelihood_diff`` are those of lm-evaluation-harness. Shares are also given of ``stereo``
    and ``antistereo`` pairs apart (the paper's stereotype and antistereotype score), and of each kind of bias.

    Args:
        scores: ``[pairs, 2]``.

    Raises:
        NumericsError: scores that are not numbers.
    """
    if not np.isfinite(scores).all():
        raise NumericsError("the model's scores are not finite numbers", hint="check the checkpoint, or use fp32")
    prefers = (scores[:, 0] > scores[:, 1]).astype(float)
    apart = np.abs(scores[:, 0] - scores[:, 1])
    metrics: dict[str, float] = {"pct_stereotype": prefers.mean(), "likelihood_diff": apart.mean()}
    errors = {"pct_stereotype": standard_error(prefers), "likelihood_diff": standard_error(apart)}
    groups = [(direction, [pair.direction == direction for pair in pairs]) for direction in _DIRECTIONS]
    groups += [(kind, [pair.kind == kind for pair in pairs]) for kind in sorted({pair.kind for pair in pairs})]
    for name, members in groups:
        if any(members):
            metrics[f"pct_stereotype_{name}"] = prefers[members].mean()
            errors[f"pct_stereotype_{name}"] = standard_error(prefers[members])
    return TaskResult(
        name="crows_pairs",
        metrics={name: float(value) for name, value in metrics.items()},
        stderr=errors,
        higher_is_better=dict.fromkeys(metrics, False),
        config={**config, "num_ties": int((scores[:, 0] == scores[:, 1]).sum())},
        version=VERSION,
        num_samples=len(pairs),
        num_original=num_original,
    )


def pair_records(pairs: Sequence[Pair], scores: np.ndarray) -> str:
    """Every pair with its scores, as JSON lines."""
    records = (
        {
            "where": pair.where, "bias_type": pair.kind, "stereo_antistereo": pair.direction,
            "sent_more": pair.more, "sent_less": pair.less, "score_more": more, "score_less": less,
        }
        for pair, (more, less) in zip(pairs, scores.tolist(), strict=True)
    )  # fmt: skip
    return json_lines(records)
