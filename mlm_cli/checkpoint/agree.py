"""Ranks agree before they go on: what failed on one rank fails on every rank, with the same error.

Without this a rank that ran out of disk would leave the others waiting in a collective for half an hour.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mlm_cli.errors import CheckpointError, MlmError, ResourceError

T = TypeVar("T")

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def on_rank_zero(fn: Callable[[], T]) -> T:
    """Run ``fn`` on rank 0 and give every rank its value, or raise its ``MlmError`` on every rank."""
    if world_size() == 1:
        return fn()
    outcome: list[Any] = [None, None]
    failure: BaseException | None = None
    if rank() == 0:
        try:
            outcome[0] = fn()
        except MlmError as error:
            outcome[1] = error
        except BaseException as error:  # a bug or an interrupt: the other ranks must not wait for ever
            failure = error
            outcome[1] = MlmError(f"rank 0 failed: {type(error).__name__}: {error}")
    dist.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise _everywhere(outcome[1])
    return outcome[0]


def all_succeed(fn: Callable[[], T]) -> T:
    """Run ``fn`` on every rank; when it raises anywhere, every rank raises the error of the lowest such rank."""
    if world_size() == 1:
        return fn()
    value: Any = None
    failure: BaseException | None = None
    try:
        value = fn()
    except BaseException as error:
        failure = error
    # One small reduction in the usual case; the errors themselves travel only when there are any.
    failed = torch.tensor([1 if failure is not None else 0], dtype=torch.int32)
    if dist.get_backend() == "nccl":
        failed = failed.cuda()
    dist.all_reduce(failed)
    if int(failed) == 0:
        return value
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, _portable(failure))
    if failure is not None and not isinstance(failure, MlmError):
        raise failure
    raise _everywhere(next(error for error in found if error is not None))


def _everywhere(error: MlmError) -> MlmError:
    """Mark an error that every rank raises, so that the user reads it once."""
    error.everywhere = True
    return error


def _portable(failure: BaseException | None) -> MlmError | None:
    if failure is None or isinstance(failure, MlmError):
        return failure
    return MlmError(f"rank {rank()} failed: {type(failure).__name__}: {failure}")


@contextmanager
def disk_errors(path: Path, doing: str) -> Iterator[None]:
    """Errors of the file system while ``doing`` something at ``path`` -> ``ResourceError`` or ``CheckpointError``."""
    try:
        yield
    except MlmError:
        raise
    except Exception as error:
        number = getattr(error, "errno", None)
        if number in _DISK_FULL or "No space left" in str(error) or "os error 28" in str(error):
            raise ResourceError(
                f"disk full while {doing} {path}",
                hint="free some space and give the same command again: the previous checkpoint is intact",
            ) from error
        if isinstance(error, OSError):
            raise CheckpointError(f"{error.strerror or error} while {doing} {error.filename or path}") from error
        raise
