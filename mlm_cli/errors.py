"""Errors a user can cause, each with the exit code that a job script can act on.

An ``MlmError`` prints as one ``error:`` line (what, and which file, line, key or rank) and one ``hint:`` line
(what to do). A traceback is shown only for exit code 1, which means a bug of ours, or with ``--verbose``.
"""

from __future__ import annotations


class MlmError(Exception):
    """Base of all expected failures.

    Args:
        message: what went wrong, naming the file, line, key or rank.
        hint: what to do about it; omitted when there is nothing useful to say.
    """

    exit_code = 1
    everywhere = False  # raised alike on every rank: only rank 0 tells the user

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(MlmError):
    """A command line or recipe that cannot be carried out; nothing was started."""

    exit_code = 2


class DataError(MlmError):
    """Input text, an indexed data set or a tokenizer that cannot be used."""

    exit_code = 3


class CheckpointError(MlmError):
    """A model folder or training state that is missing, damaged or does not fit."""

    exit_code = 4


class NumericsError(MlmError):
    """A loss or gradient that is not a finite number."""

    exit_code = 5


class RankLostError(MlmError):
    """A process of the job died or stopped answering."""

    exit_code = 6


class ResourceError(MlmError):
    """Out of disk space or memory."""

    exit_code = 7


class StoppedError(MlmError):
    """Stopped by a signal or a time limit after a good checkpoint was saved: put the job back in the queue."""

    exit_code = 75
