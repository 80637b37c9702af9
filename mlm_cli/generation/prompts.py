"""What is to be continued: prompts from the command line, a JSONL file or standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from mlm_cli.errors import DataError
from mlm_cli.generation.passages import Retrieved

# A prompt line longer than this is no prompt; reading on would only fill the memory.
_LONGEST_LINE = 16 << 20


@dataclass(frozen=True)
class Prompt:
    """One text to continue.

    Attributes:
        number: position in the input, from 0; random numbers hang on it.
        text: what to continue; may be empty.
        id: given by the user, else ``number``.
        where: for messages: ``file:line`` or the like.
        fields: what else stood in the line, carried through to the answer.
        retrieved: passages that the model is given before the text; None: there is no knowledge base.
    """

    number: int
    text: str
    id: Any
    where: str
    fields: dict[str, Any] = field(default_factory=dict)
    retrieved: Retrieved | None = None


def from_texts(texts: Iterable[str]) -> Iterator[Prompt]:
    """Prompts given on the command line."""
    for number, text in enumerate(texts):
        yield Prompt(number, text, number, f"--prompt number {number + 1}")


def from_text_stream(stream: BinaryIO) -> Prompt:
    """All of standard input as one prompt.

    Raises:
        DataError: not UTF-8.
    """
    data = stream.read(_LONGEST_LINE + 1)
    if len(data) > _LONGEST_LINE:
        raise DataError(f"standard input: a prompt of more than {_LONGEST_LINE >> 20} MiB")
    try:
        return Prompt(0, data.decode("utf-8"), 0, "standard input")
    except UnicodeDecodeError as error:
        raise DataError(
            f"standard input: not UTF-8 at byte {error.start}", hint="convert it, for example with `iconv -t utf-8`"
        ) from None


def from_jsonl(path: str) -> Iterator[Prompt]:
    """Prompts of a JSONL file (``-``: standard input), one object a line with ``prompt`` (else ``text``), maybe ``id``.

    Blank lines are skipped.

    Raises:
        DataError: no such file, no prompts, or a line that is not such an object, with ``file:line``.
    """
    if path == "-":
        yield from _parse(sys.stdin.buffer, "standard input")
        return
    try:
        with Path(path).open("rb") as lines:
            yield from _parse(lines, path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror}", hint="check the path given to `--prompts`"
        ) from None


def _parse(lines: BinaryIO, name: str) -> Iterator[Prompt]:
    number = 0
    line_number = 0
    while line := lines.readline(_LONGEST_LINE + 1):
        line_number += 1
        where = f"{name}:{line_number}"
        if len(line) > _LONGEST_LINE:
            raise DataError(f"{where}: a line of more than {_LONGEST_LINE >> 20} MiB")
        if line.strip():
            yield _prompt(line, number, where)
            number += 1
    if number == 0:
        raise DataError(f"{name}: no prompts in it", hint='one JSON object a line: {"prompt": "Once upon a time"}')


def _prompt(line: bytes, number: int, where: str) -> Prompt:
    try:
        record = json.loads(line.decode("utf-8-sig" if number == 0 else "utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start} of the line") from None
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise DataError(
            f"{where}: not JSON: {reason}", hint='one JSON object a line: {"prompt": "Once upon a time"}'
        ) from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON object was expected, not {type(record).__name__}")
    key = "prompt" if "prompt" in record else "text"
    if key not in record:
        raise DataError(f"{where}: no `prompt` in it; keys: {', '.join(map(repr, record)) or 'none'}")
    text = record.pop(key)
    if not isinstance(text, str):
        raise DataError(f"{where}: `{key}` is not a string but {type(text).__name__}")
    return Prompt(number, text, record.pop("id", number), where, record)
