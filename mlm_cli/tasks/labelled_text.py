"""Rows of ``.tsv``, ``.csv``, ``.jsonl`` (also ``.gz``, ``.zst``): a text, perhaps a second one, and a label."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlm_cli.data.compressed import PACKED, open_unpacked
from mlm_cli.errors import DataError

Column = str | int


@dataclass(frozen=True)
class Columns:
    """Where a row holds what. Columns are names, or numbers from 0; ``header`` None: there is one if a name is used."""

    text: Column = "text"
    label: Column = "label"
    text_pair: Column | None = None
    header: bool | None = None

    @property
    def asked(self) -> list[Column]:
        return [column for column in (self.text, self.text_pair, self.label) if column is not None]

    @property
    def has_header(self) -> bool:
        return any(isinstance(column, str) for column in self.asked) if self.header is None else self.header


@dataclass(frozen=True)
class Example:
    """One labelled text. ``where`` is its ``file:line``."""

    text: str
    text_pair: str | None
    label: str
    where: str


def read_examples(path: str | Path, columns: Columns) -> list[Example]:
    """All rows of a file, in order; blank lines are passed over.

    Raises:
        DataError: a file that does not open, a format that is not known, a malformed row, a missing column or label,
            no rows; naming file and line.
    """
    path = Path(path)
    suffix = Path(path.stem).suffix if path.suffix in PACKED else path.suffix
    if suffix not in (".tsv", ".csv", ".jsonl"):
        raise DataError(f"{path}: labelled text is read from .tsv, .csv or .jsonl files (also .gz or .zst)")
    try:
        with _open(path) as file:
            rows = _json_rows(path, file, columns) if suffix == ".jsonl" else _table_rows(path, suffix, file, columns)
            examples = list(rows)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start} of a block") from None
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {path}: {reason}") from None
    if not examples:
        raise DataError(f"{path} holds no examples")
    return examples


def _open(path: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(open_unpacked(path), encoding="utf-8-sig", newline="")


def _table_rows(path: Path, suffix: str, file: io.TextIOWrapper, columns: Columns) -> Iterator[Example]:
    # Tab-separated files of this field do not quote: a `"` is a character of the text (MRPC, SST-2).
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {"strict": True}
    csv.field_size_limit(1 << 30)
    reader = csv.reader(file, **options)
    names: list[str] | None = None
    places: dict[Column, int] = {}
    line = 1
    try:
        for fields in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if not fields:
                continue
            if names is None:
                names = fields if columns.has_header else []
                places = {column: _place(column, names, where) for column in columns.asked}
                if columns.has_header:
                    continue
            values = {column: _field(fields, place, column, where) for column, place in places.items()}
            yield _example(values, columns, where)
    except csv.Error as error:
        raise DataError(f"{path}:{line} is malformed: {error}") from None


def _place(column: Column, names: list[str], where: str) -> int:
    if isinstance(column, int):
        return column
    if column in names:
        return names.index(column)
    found = ", ".join(f"`{name}`" for name in names) if names else "no header line (task.header is false)"
    raise DataError(
        f"{where} has no column `{column}`; found {found}",
        hint="set task.text_column and task.label_column to a name of the header line, or to a number from 0",
    )


def _field(fields: list[str], place: int, column: Column, where: str) -> str:
    if not 0 <= place < len(fields):
        raise DataError(f"{where} has {len(fields)} columns, none with number {place} (asked for `{column}`)")
    return fields[place]


def _json_rows(path: Path, file: io.TextIOWrapper, columns: Columns) -> Iterator[Example]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
        values: dict[Column, str] = {}
        for column in columns.asked:
            try:
                value = record[column]
            except (KeyError, IndexError, TypeError):
                keys = ", ".join(f"`{key}`" for key in record) if isinstance(record, dict) else "no keys"
                raise DataError(f"{where} has no `{column}`; found {keys}") from None
            if not isinstance(value, str | int | float):
                raise DataError(f"{where}: `{column}` is {json.dumps(value)[:40]}, not a text or a number")
            values[column] = value if isinstance(value, str) else json.dumps(value)
        yield _example(values, columns, where)


def _example(values: dict[Column, str], columns: Columns, where: str) -> Example:
    label = values[columns.label].strip()
    if not label:
        raise DataError(f"{where} has no label (column `{columns.label}` is empty)")
    pair = values[columns.text_pair] if columns.text_pair is not None else None
    return Example(values[columns.text], pair, label, where)
