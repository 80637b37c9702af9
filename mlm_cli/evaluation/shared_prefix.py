"""In which order to read token sequences so that what several begin with is read once. Plain lists; no model here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Ids = Sequence[int]


@dataclass(frozen=True)
class Read:
    """Go back to the first ``depth`` tokens of what was read, and read ``ids`` behind them."""

    depth: int
    ids: Ids


@dataclass(frozen=True)
class Batch:
    """Read the rest of these rows, each behind the ``depth`` tokens that they share with what was read."""

    depth: int
    numbers: list[int]


def plan_rows(rows: Sequence[Ids], limits: Sequence[int], *, batch_size: int, worth: int) -> Iterator[Read | Batch]:
    """Steps after which every row has been in one ``Batch``.

    Rows are walked as the tree of their beginnings (a radix tree), children before what is left of their parent, so
    that one path from the root is all that must be kept.

    Args:
        rows: in lexicographic order.
        limits: tokens of each row that may be read as a shared beginning: less than it has.
        batch_size: rows of a batch at most.
        worth: tokens that must be saved for a beginning to be read by itself.
    """
    open_nodes = [_node(rows, limits, 0, len(rows), 0, batch_size, worth)]  # from the root down; a stack of our own
    while open_nodes:
        step = next(open_nodes[-1], None)
        if step is None:
            open_nodes.pop()
        elif isinstance(step, _Child):
            open_nodes.append(_node(rows, limits, step.first, step.last, step.depth, batch_size, worth))
        else:
            yield step


@dataclass(frozen=True)
class _Child:
    """Rows ``first`` to ``last``, which share ``depth`` tokens that have been read: their steps come next."""

    first: int
    last: int
    depth: int


def _node(
    rows: Sequence[Ids], limits: Sequence[int], first: int, last: int, depth: int, batch_size: int, worth: int
) -> Iterator[Read | Batch | _Child]:
    rest: list[int] = []
    for begin, end, shared in _children(rows, limits, first, last, depth):
        saved = shared - depth  # by each row but the first; little of it is not worth a smaller batch
        if saved * (end - begin - 1) > worth and saved > worth // 4:
            yield Read(depth, rows[begin][depth:shared])
            yield _Child(begin, end, shared)
        else:
            rest += range(begin, end)
    rest.sort(key=lambda number: len(rows[number]))  # rows of a batch are padded to the longest
    for at in range(0, len(rest), batch_size):
        yield Batch(depth, rest[at : at + batch_size])


def _children(
    rows: Sequence[Ids], limits: Sequence[int], first: int, last: int, depth: int
) -> Iterator[tuple[int, int, int]]:
    """Runs of rows that share more than ``depth`` tokens: (first row, one after the last, tokens shared)."""
    begin = first
    while begin < last:
        if limits[begin] <= depth:
            yield begin, begin + 1, depth
            begin += 1
            continue
        token, end, limit = rows[begin][depth], begin + 1, limits[begin]
        while end < last and limits[end] > depth and rows[end][depth] == token:
            limit = min(limit, limits[end])
            end += 1
        yield begin, end, _common(rows[begin], rows[end - 1], depth, limit)
        begin = end


def _common(a: Ids, b: Ids, depth: int, limit: int) -> int:
    """Tokens that two rows begin with, up to ``limit``; ``depth`` are known. In sorted rows those between do, too."""
    while depth < limit and a[depth] == b[depth]:
        depth += 1
    return depth
