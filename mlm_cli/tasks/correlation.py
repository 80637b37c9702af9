"""Pearson's and Spearman's correlation of predictions with labels, in float64, and their standard errors."""

from __future__ import annotations

import numpy as np


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Of two series of equal length; 0 where one of them does not vary, which says nothing about the other."""
    x, y = x.astype(np.float64) - np.mean(x, dtype=np.float64), y.astype(np.float64) - np.mean(y, dtype=np.float64)
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else 0.0


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing the mean of theirs; float64."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group.reshape(-1)]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation of the ranks."""
    return pearson(ranks(x), ranks(y))


def correlations(
    predicted: np.ndarray, labels: np.ndarray, *, seed: int, draws: int = 200
) -> tuple[dict[str, float], dict[str, float | None]]:
    """``pearson`` and ``spearman``, and their standard errors by bootstrap over examples (None: fewer than 3)."""
    metrics = {"pearson": pearson(predicted, labels), "spearman": spearman(predicted, labels)}
    if len(labels) < 3:
        return metrics, dict.fromkeys(metrics)
    generator, found = np.random.default_rng(seed), []
    for _ in range(draws):
        drawn = generator.integers(0, len(labels), len(labels))
        found.append((pearson(predicted[drawn], labels[drawn]), spearman(predicted[drawn], labels[drawn])))
    errors = np.std(np.array(found), axis=0, ddof=1)
    return metrics, dict(zip(metrics, map(float, errors), strict=True))
