"""Talk goes to stderr; stdout is for data. Only rank 0 talks, other ranks write to their log files."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_quiet = False
_verbose = False
_muted = False


def setup(*, quiet: bool = False, verbose: bool = False) -> None:
    """Set how much is said. ``quiet`` leaves only warnings and errors; ``verbose`` adds detail and tracebacks."""
    global _quiet, _verbose
    _quiet, _verbose = quiet, verbose


@contextmanager
def muted() -> Iterator[None]:
    """Nothing is said inside the block, not even warnings; errors are."""
    global _muted
    before, _muted = _muted, True
    try:
        yield
    finally:
        _muted = before


def is_quiet() -> bool:
    return _quiet


def is_verbose() -> bool:
    return _verbose


def is_talker() -> bool:
    """True on the rank that talks to the user."""
    return os.environ.get("RANK", "0") == "0" and not _muted


@cache
def console() -> Console:
    """The rich console on stderr, made on first use: importing rich costs more than most commands take."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def info(message: str) -> None:
    if not _quiet and is_talker():
        _say(message)


def detail(message: str) -> None:
    """Said only with ``--verbose``, on every rank."""
    if _verbose and not _muted:
        _say(message if is_talker() else f"[rank {os.environ.get('RANK')}] {message}")


def warn(message: str) -> None:
    if is_talker():
        _say(f"warning: {message}")


def error(message: str, hint: str | None = None) -> None:
    _say(f"error: {message}")
    if hint:
        _say(f"hint: {hint}")
