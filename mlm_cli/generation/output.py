"""Answers on their way out: JSON lines, or text for people. Nothing but answers goes here."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from mlm_cli.errors import UsageError
from mlm_cli.generation.answer import Answer
from mlm_cli.generation.prompts import Prompt


class AnswerWriter:
    """Writes answers to standard output or to a file, which gets its name when it is complete.

    Text of one prompt is shown piece by piece. Several answers in text form get a line with the prompt's id first, as
    ``head`` does for several files; to read them by program use JSON.

    Args:
        path: file to write; None is standard output.
        as_json: one JSON object a line.
        many: several prompts.
        provenance: of all answers, for their lines of JSON; each gets its prompt's number too, on which its random
            numbers hang beside the seed. None: not told.

    Raises:
        UsageError: the file cannot be written.
    """

    def __init__(
        self,
        path: str | None,
        *,
        as_json: bool,
        many: bool,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        self._path, self._as_json, self._many = Path(path) if path else None, as_json, many
        self._provenance = provenance
        self._first = True
        self._out: TextIO = sys.stdout
        if self._path is not None:
            try:
                if self._path.is_dir():
                    raise IsADirectoryError(21, os.strerror(21))
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._out = self._partial.open("w", encoding="utf-8", newline="")
            except OSError as error:
                raise UsageError(f"cannot write `{path}`: {error.strerror}", hint="choose another --output") from None
        elif hasattr(sys.stdout, "reconfigure"):
            # Text of a model is UTF-8 whatever the locale says; a pipe must not turn it into an error.
            sys.stdout.reconfigure(encoding="utf-8", errors="replace")

    @property
    def _partial(self) -> Path:
        assert self._path is not None
        return self._path.with_name(self._path.name + ".partial")

    @property
    def streams(self) -> bool:
        """Whether pieces are shown as they come."""
        return not self._as_json and not self._many

    def show(self, _prompt: Prompt, piece: str) -> None:
        """A piece of the one answer in the making."""
        self._out.write(piece)
        self._out.flush()

    def write(self, answer: Answer) -> None:
        """A finished answer. Its text is left out where it was shown already."""
        if self._as_json:
            record = answer.record()
            if self._provenance is not None:
                record["provenance"] = {**self._provenance, "prompt_number": answer.prompt.number}
            self._out.write(json.dumps(record, ensure_ascii=False) + "\n")
        elif self._many:
            gap = "" if self._first else "\n"
            self._out.write(f"{gap}==> {answer.prompt.id} <==\n{answer.text}\n")
        else:
            self._out.write("\n")
        self._first = False
        self._out.flush()

    def __enter__(self) -> AnswerWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._path is not None:
            self._out.close()
            if kind is None:
                self._partial.replace(self._path)
