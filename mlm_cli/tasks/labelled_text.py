"""Rows of ``.tsv``, ``.csv``, ``.jsonl`` (also ``.gz``, ``.zst``): a text, perhaps a second one, and a label."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlm_cli.config.schema import TaskSection
from mlm_cli.config.tasks import WRITTEN_KINDS
from mlm_cli.data.compressed import PACKED, open_unpacked
from mlm_cli.errors import DataError

Column = str | int
TABLES = (".tsv", ".csv", ".jsonl")


# Values of a row by the column they were asked for under; a list of texts only where one may be.
Values = dict[Column, Any]


@dataclass(frozen=True)
class Columns:
    """Where a row holds what. Columns are names, or numbers from 0; ``header`` None: there is one if a name is used.

    ``choices``: columns of a question's choices, one each, or a single one with a list (``.jsonl``).
    ``written``: the label is a text to be written. It may be a list, of texts that are all right, and the text one of
    sentences (``.jsonl``).
    """

    text: Column = "text"
    label: Column = "label"
    text_pair: Column | None = None
    header: bool | None = None
    choices: tuple[Column, ...] = ()
    written: bool = False

    @property
    def asked(self) -> list[Column]:
        return [column for column in (self.text, self.text_pair, self.label, *self.choices) if column is not None]

    @property
    def lists(self) -> tuple[Column, ...]:
        """Columns that may hold a list of texts."""
        if self.written:
            return self.text, self.label
        return self.choices if len(self.choices) == 1 else ()

    @property
    def has_header(self) -> bool:
        return any(isinstance(column, str) for column in self.asked) if self.header is None else self.header


@dataclass(frozen=True)
class Example:
    """One labelled text. ``where`` is its ``file:line``; ``choices`` the texts to choose from.

    ``references``: where several texts are right, all of them; ``label`` is the first.
    """

    text: str
    text_pair: str | None
    label: str
    where: str
    choices: tuple[str, ...] = ()
    references: tuple[str, ...] = ()


def columns_of(section: TaskSection) -> Columns:
    """The columns that a recipe's ``task`` section names."""
    choices = section.choice_columns if section.name == "multiple_choice" else ()
    columns = (section.text_column, section.label_column, section.text_pair_column)
    return Columns(*columns, section.header, choices, section.name in WRITTEN_KINDS)


def read_examples(path: str | Path, columns: Columns) -> list[Example]:
    """All rows of a file, in order; blank lines are passed over.

    Raises:
        DataError: a file that does not open, a format that is not known, a malformed row, a missing column or label,
            no rows; naming file and line.
    """
    path = Path(path)
    suffix = Path(path.stem).suffix if path.suffix in PACKED else path.suffix
    if suffix not in TABLES:
        raise DataError(f"{path}: labelled text is read from .tsv, .csv or .jsonl files (also .gz or .zst)")
    with opened_text(path) as file:
        rows = _json_rows(path, file, columns) if suffix == ".jsonl" else _table_rows(path, suffix, file, columns)
        examples = list(rows)
    if not examples:
        raise DataError(f"{path} holds no examples")
    return examples


def number_of(example: Example) -> float:
    """The label as a number.

    Raises:
        DataError: it is none, naming file and line.
    """
    try:
        value = float(example.label)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(
            f"{example.where}: label `{example.label}` is not a number",
            hint="check task.label_column; names of classes are for `task.name=classification`",
        )
    return value


@contextmanager
def opened_text(path: Path) -> Iterator[io.TextIOWrapper]:
    """A text file, packed or not.

    Raises:
        DataError: it does not open, is cut off or is not UTF-8.
    """
    try:
        with _open(path) as file:
            yield file
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start} of a block") from None
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {path}: {reason}") from None


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
        values: Values = {}
        for column in columns.asked:
            try:
                value = record[column]
            except (KeyError, IndexError, TypeError):
                keys = ", ".join(f"`{key}`" for key in record) if isinstance(record, dict) else "no keys"
                raise DataError(f"{where} has no `{column}`; found {keys}") from None
            if column in columns.lists and (isinstance(value, list) or not columns.written):
                if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                    raise DataError(f"{where}: `{column}` is {json.dumps(value)[:40]}, not a list of texts")
                values[column] = [_sound(item, column, where) for item in value]
                continue
            if not isinstance(value, str | int | float):
                raise DataError(f"{where}: `{column}` is {json.dumps(value)[:40]}, not a text or a number")
            values[column] = _sound(value, column, where) if isinstance(value, str) else json.dumps(value)
        yield _example(values, columns, where)


def _sound(text: str, column: Column, where: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):  # JSON can spell half of a character
        raise DataError(f"{where}: `{column}` holds half of a surrogate pair, which is no text")
    return text


def _example(values: Values, columns: Columns, where: str) -> Example:
    found = values[columns.label]
    labels = [label.strip() for label in (found if isinstance(found, list) else [found])]
    if not labels or not all(labels):
        raise DataError(f"{where} has no label (column `{columns.label}` is empty)")
    text = values[columns.text]
    pair = values[columns.text_pair] if columns.text_pair is not None else None
    found = [values[column] for column in columns.choices]
    choices = found[0] if len(found) == 1 and isinstance(found[0], list) else found
    references = tuple(labels) if len(labels) > 1 else ()
    return Example(
        text if isinstance(text, str) else " ".join(text), pair, labels[0], where, tuple(choices), references
    )
