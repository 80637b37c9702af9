"""Bytes of a segment -> documents, and what is wrong with the lines that hold none. Runs in the workers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from mlm_cli.data.segment import Segment, read_segment

Document = str | list[str]
_JSON_NAMES = {dict: "an object", list: "an array", int: "a number", float: "a number", bool: "true or false"}


@dataclass
class Parsed:
    """Documents of a segment, key by key, and the line of each (from 1 within the segment).

    ``read`` counts lines with content, ``lines`` all of them. ``bad`` holds (line, reason).
    """

    documents: dict[str, list[Document]]
    lines: int = 0
    read: int = 0
    numbers: list[int] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)


def parse_segment(segment: Segment, keys: tuple[str, ...], max_line: int) -> Parsed:
    """Read and parse one segment. Never raises for what the text holds: that is in ``bad``."""
    parsed = Parsed({key: [] for key in keys})
    if segment.mode == "end":
        return parsed
    if segment.mode == "empty":
        return _refuse(parsed, "the file is empty", lines=0)
    if segment.mode == "long":
        return _refuse(parsed, f"longer than {max_line / 2**20:.3g} MiB")
    if segment.mode == "arrow":
        from mlm_cli.data.parquet_text import read_table

        return _rows(parsed, read_table(segment.path, keys), keys)
    data = read_segment(segment)
    if segment.mode == "whole":
        return _whole(parsed, data, keys)
    try:
        lines: list[Any] = data.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        lines = list(data.split(b"\n"))
    if not lines[-1]:
        lines.pop()  # what follows the last line end is no line
    parsed.lines = len(lines)
    for number, line in enumerate(lines, 1):
        if not line or line.isspace():
            continue
        parsed.read += 1
        if isinstance(line, bytes):
            try:
                line = line.decode("utf-8")
            except UnicodeDecodeError as error:
                parsed.bad.append((number, f"invalid UTF-8 at byte {error.start + 1} of the line"))
                continue
        if len(line) * 4 > max_line and len(line.encode("utf-8", "replace")) > max_line:
            parsed.bad.append((number, f"longer than {max_line / 2**20:.3g} MiB"))
            continue
        if segment.mode == "lines":
            _take(parsed, number, (line.rstrip("\r"),), keys)
            continue
        found = _json_texts(line, keys)
        if isinstance(found, str):
            parsed.bad.append((number, found))
        else:
            _take(parsed, number, found, keys)
    return parsed


def _take(parsed: Parsed, number: int, texts: tuple[Document, ...], keys: tuple[str, ...]) -> None:
    parsed.numbers.append(number)
    for key, text in zip(keys, texts, strict=True):
        parsed.documents[key].append(text)


def _refuse(parsed: Parsed, reason: str, lines: int = 1) -> Parsed:
    parsed.lines, parsed.read = lines, 1
    parsed.bad.append((lines, reason))
    return parsed


def _whole(parsed: Parsed, data: bytes, keys: tuple[str, ...]) -> Parsed:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse(parsed, "")
        line = data.count(b"\n", 0, error.start) + 1
        parsed.bad[0] = (line, f"invalid UTF-8 at byte {error.start + 1} of the file")
        return parsed
    parsed.lines = parsed.read = 1
    _take(parsed, 1, (text,), keys)
    return parsed


def _json_texts(line: str, keys: tuple[str, ...]) -> tuple[Document, ...] | str:
    """The document of each key, or what is wrong."""
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        if line.lstrip() == "[":
            return "malformed JSON: a file that is one array; there must be one object a line (jq -c '.[]' makes it so)"
        return f"malformed JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        return f"malformed JSON: {error}"
    if not isinstance(content, dict):
        return f"malformed JSON: {_named(content)}, not an object"
    return _row_texts(content, keys)


def _row_texts(content: dict[str, Any], keys: tuple[str, ...]) -> tuple[Document, ...] | str:
    texts: list[Document] = []
    for key in keys:
        try:
            text = content[key]
        except KeyError:
            known = ", ".join(f"`{name}`" for name in list(content)[:6]) or "no key at all"
            return f"no key `{key}` (it has {known})"
        problem = _problem(key, text)
        if problem:
            return problem
        texts.append(text)
    return tuple(texts)


def _problem(key: str, text: Any) -> str | None:
    if isinstance(text, list):  # sentences of a document, as Megatron takes them
        return next((problem for item in text if (problem := _problem(key, "" if item == [] else item))), None)
    if not isinstance(text, str):
        return f"`{key}` is {_named(text)}, not text"
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return f"`{key}` holds half a surrogate pair (a `\\ud8..` escape without its partner)"
    return None


def _named(value: Any) -> str:
    return "null" if value is None else _JSON_NAMES.get(type(value), type(value).__name__)


def _rows(parsed: Parsed, rows: list[dict[str, Any]], keys: tuple[str, ...]) -> Parsed:
    parsed.lines = parsed.read = len(rows)
    for number, row in enumerate(rows, 1):
        found = _row_texts(row, keys)
        if isinstance(found, str):
            parsed.bad.append((number, found))
        else:
            _take(parsed, number, found, keys)
    return parsed
