"""Flags of the verbs that read raw text, each defined once. None means not given; the default is named in the help."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from mlm_cli.errors import UsageError

InputsArgument = Annotated[list[str] | None, typer.Argument(metavar="INPUT...", hidden=True)]
JsonKeyFlag = Annotated[
    list[str] | None,
    typer.Option("--json-key", metavar="KEY", help="Where the text is; may be repeated (one set a key). [text]"),
]
InputFormatFlag = Annotated[
    Literal["auto", "jsonl", "txt", "parquet"] | None,
    typer.Option("--input-format", help="auto: by the file's name. [auto]"),
]
TxtDocumentsFlag = Annotated[
    Literal["file", "line"] | None,
    typer.Option("--txt-documents", help="A .txt file: one document, or one a line. [file]"),
]
OnBadLineFlag = Annotated[
    Literal["stop", "skip"] | None, typer.Option("--on-bad-line", help="skip: left out, counted and listed. [stop]")
]
MaxLineFlag = Annotated[
    float | None,
    typer.Option("--max-line-mb", metavar="MB", help="A longer line (or .txt document) is a bad one. [32]"),
]
OverwriteFlag = Annotated[bool, typer.Option("--overwrite", help="Replace what is under --output.")]


def refuse(mode: str, flags: dict[str, Any]) -> None:
    """Refuse flags that mean nothing together with ``mode``.

    Raises:
        UsageError: naming every one that was given.
    """
    given = [f"`{flag}`" for flag, value in flags.items() if value not in (None, False, [], ())]
    if given:
        raise UsageError(f"{mode} does not take {', '.join(given)}", hint="leave that out")
