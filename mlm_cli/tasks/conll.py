"""CoNLL files: a token a line with its columns, a blank line between sentences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlm_cli.errors import DataError
from mlm_cli.tasks.labelled_text import opened_text


@dataclass(frozen=True)
class Sentence:
    """Tokens and the tag of each. ``where`` is ``file:line`` of the first token."""

    tokens: tuple[str, ...]
    tags: tuple[str, ...]
    where: str


def read_conll(path: str | Path, token_column: int = 0, tag_column: int = -1) -> list[Sentence]:
    """All sentences of a file. Columns are parted by tabs, or by white space where a line has no tab; ``-DOCSTART-``
    lines are passed over.

    Raises:
        DataError: a file that does not open, a line with too few columns, no sentences; naming file and line.
    """
    path = Path(path)
    sentences: list[Sentence] = []
    tokens: list[str] = []
    tags: list[str] = []
    begin = 1

    def end() -> None:
        if tokens:
            sentences.append(Sentence(tuple(tokens), tuple(tags), f"{path}:{begin}"))
        tokens.clear()
        tags.clear()

    with opened_text(path) as file:
        for number, raw in enumerate(file, 1):
            line = raw.rstrip("\r\n")
            if not line.strip():
                end()
                continue
            fields = [field.strip() for field in line.split("\t")] if "\t" in line else line.split()
            if fields[0] == "-DOCSTART-":
                continue
            try:
                token, tag = fields[token_column], fields[tag_column]
            except IndexError:
                raise DataError(
                    f"{path}:{number} has {len(fields)} columns; column {token_column} and {tag_column} are asked for"
                ) from None
            if len(fields) < 2 or not tag:
                raise DataError(
                    f"{path}:{number} has a token and no tag: {line[:40]!r}",
                    hint="a CoNLL file has a token and its tag a line, and blank lines between sentences",
                )
            if not tokens:
                begin = number
            tokens.append(token)
            tags.append(tag)
    end()
    if not sentences:
        raise DataError(f"{path} holds no sentences")
    return sentences
