"""Parallel text: two files of which line n of the one says what line n of the other does, as translations come."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from mlm_cli import log
from mlm_cli.data.compressed import PACKED
from mlm_cli.errors import DataError
from mlm_cli.tasks.labelled_text import Column, Example, opened_text


def find_parallel(prefix: str, source: Column, target: Column) -> tuple[Path, Path] | None:
    """``PREFIX.source`` and ``PREFIX.target`` (also ``.gz``, ``.zst``), such as ``train.en`` and ``train.de``.

    None: neither is there, or ``prefix`` is a file itself.

    Raises:
        DataError: one of them is missing.
    """
    if Path(prefix).is_file():
        return None
    names = [f"{prefix}.{column}" for column in (source, target)]
    first, second = (
        next((path for suffix in ("", *PACKED) if (path := Path(f"{name}{suffix}")).is_file()), None) for name in names
    )
    if first is None and second is None:
        return None
    if first is None or second is None:
        raise DataError(
            f"{first or second} is there, {names[0] if first is None else names[1]} is not",
            hint="aligned lines are two files, named by task.text_column and task.label_column",
        )
    return first, second


def read_parallel(source: Path, target: Path) -> list[Example]:
    """The pairs of lines, in order. Those of which one side is blank are left out, which is said.

    Raises:
        DataError: a file that does not open, files with different numbers of lines, no pairs.
    """
    pairs, blank = [], 0
    for number, (text, label) in enumerate(zip_longest(_lines(source), _lines(target)), 1):
        if text is None or label is None:
            short, long = (source, target) if text is None else (target, source)
            raise DataError(
                f"{short} ends after line {number - 1}, {long} does not",
                hint="line n of one file is the translation of line n of the other",
            )
        if text and label:
            pairs.append(Example(text, None, label, f"{source}:{number}"))
        else:
            blank += 1
    if blank:
        log.warn(f"{source}: {blank:,} lines are left out, which are blank there or in {target.name}")
    if not pairs:
        raise DataError(f"{source} and {target} hold no pairs of lines")
    return pairs


def _lines(path: Path) -> Iterator[str]:
    with opened_text(path) as file:  # each by itself: errors name the file that they are in
        file.reconfigure(newline="\n")  # a stray carriage return in a sentence would put all that follows out of step
        for line in file:
            yield line.strip()
