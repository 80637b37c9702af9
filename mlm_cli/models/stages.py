"""Sharing out a list of layers over the stages of a pipeline. No torch: `mlm plan` uses it too."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from mlm_cli.config.schema import ModelSection
from mlm_cli.models.count import layer_counts


def layer_costs(model: ModelSection) -> list[int]:
    """Share of the work of each entry of a family's layer list."""
    return [layer.cost for layer in layer_counts(model)]


def balance(costs: Sequence[int], num_stages: int) -> list[range]:
    """Consecutive, non-empty parts of the list whose dearest one is as cheap as can be.

    Layers without cost (norms, the embedding's lookup) go with the later neighbour where that is as good.

    Raises:
        ValueError: fewer layers than stages.
    """
    if len(costs) < num_stages:
        raise ValueError(f"{len(costs)} layers cannot fill {num_stages} stages")
    sums = [0, *accumulate(costs)]
    # best[stop]: (cost of the dearest part, where the last part begins), for the first `stop` layers in `stage` parts
    tables = [{stop: (sums[stop], 0) for stop in range(1, len(costs) + 1)}]
    for stage in range(2, num_stages + 1):
        tables.append(
            {
                stop: min(
                    (max(tables[-1][start][0], sums[stop] - sums[start]), start) for start in range(stage - 1, stop)
                )
                for stop in range(stage, len(costs) + 1)
            }
        )
    parts, stop = [], len(costs)
    for table in reversed(tables):
        start = table[stop][1]
        parts.append(range(start, stop))
        stop = start
    return parts[::-1]
