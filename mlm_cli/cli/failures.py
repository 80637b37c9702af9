"""From an exception to a message and an exit code."""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
from collections.abc import Sequence

from mlm_cli import log
from mlm_cli.errors import CheckpointError, MlmError, RankLostError, ResourceError, UsageError

BROKEN_PIPE = 128 + 13  # as if SIGPIPE had ended us
INTERRUPTED = 130
_LOST = re.compile(
    r"connection (reset|closed|refused) by peer|connect(ion)? (was )?closed|broken pipe|timed out|socket timeout|"
    r"nccl (communicator|error)|remote process exited|peer closed",
    re.IGNORECASE,
)
_NO_MEMORY = re.compile(r"can't allocate memory|out of memory|cannot allocate memory", re.IGNORECASE)


def exit_code_of(error: BaseException, arguments: Sequence[str]) -> int:
    """Tell the user about ``error``, once, and return the exit code of the process."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else (0 if error.code is None else 1)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError) and _stdout_closed():
        return BROKEN_PIPE
    known = as_mlm_error(error, arguments)
    if known is None:
        return _bug(error)
    rank = os.environ.get("RANK", "0")
    alike = known.everywhere or known.exit_code == UsageError.exit_code
    if alike and rank != "0" and "MLM_SUPERVISED" not in os.environ:
        return known.exit_code  # rank 0 tells
    if log.is_verbose() and known.exit_code != UsageError.exit_code:
        _traceback(error)
    if known.exit_code == 75:
        log.warn(known.message)
    else:
        log.error(known.message, known.hint)
    return known.exit_code


def as_mlm_error(error: BaseException, arguments: Sequence[str] = ()) -> MlmError | None:
    """The error a user can act on; None when it is a bug of ours."""
    if isinstance(error, MlmError):
        return error
    if hasattr(error, "format_message"):  # typer's usage errors; older versions take them from click
        return _usage(error, arguments)
    if type(error).__name__ == "Abort":
        return UsageError("no more input", hint="`--help` shows how to give it on the command line")
    where = f" while writing `{error.filename}`" if isinstance(error, OSError) and error.filename else ""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"the disk is full{where}", hint="free some space, or choose another `--output`")
    if isinstance(error, OSError) and error.errno == errno.EROFS:  # ext4 does this by itself to a disk with errors
        hint = "make it writable and give the same command again, or choose another `--output`"
        return CheckpointError(f"the file system is read-only{where}", hint=hint)
    text = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(text)):
        first = text.splitlines()[0] if text else "an allocation failed"
        hint = "a smaller `train.micro_batch_size`, `train.recompute=full`, or more ranks; `mlm plan` estimates memory"
        return ResourceError(f"out of memory: {first}", hint=hint)
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1" and isinstance(error, RuntimeError) and _LOST.search(text):
        rank, first = os.environ.get("RANK", "?"), text.splitlines()[0]
        return RankLostError(f"rank {rank} of {world} lost another rank: {first}", hint="that rank's own log says why")
    return None


def _usage(error: BaseException, arguments: Sequence[str]) -> UsageError:
    message = str(error.format_message()).strip().rstrip(".")  # type: ignore[attr-defined]
    message = re.sub(r"'([^']*)'", r"`\1`", re.sub(r"\s*\(Possible options:.*\)$", "", message))
    message = message.replace("Value error, ", "")
    message = re.sub(r"\s+", " ", message[:1].lower() + message[1:])
    verb = arguments[0] if arguments else ""
    hint = f"`mlm {verb} --help` shows what it takes"
    option = getattr(error, "option_name", None)
    if option:
        from mlm_cli.config.keys import suggest

        name = option.lstrip("-").replace("-", "_")
        key, flags = suggest(name), getattr(error, "possibilities", None)
        if flags and (key is None or name not in (key, key.rpartition(".")[2])):
            hint = f"did you mean `{difflib.get_close_matches(option, flags, 1, 0)[0]}`?"
        elif key:
            hint = f"recipe keys are given without dashes: `{key}=VALUE`"
    return UsageError(message, hint=hint)


def _bug(error: BaseException) -> int:
    _traceback(error)
    log.error(
        f"a bug in mlm: {type(error).__name__}: {error}",
        "please report it with the lines above and the output of `mlm doctor`",
    )
    return MlmError.exit_code


def _traceback(error: BaseException) -> None:
    import traceback

    sys.stderr.write("".join(traceback.format_exception(error)))


def _stdout_closed() -> bool:
    """True when it was our stdout that broke; then nothing may be flushed to it at exit."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        pass
    except ValueError:
        return False
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    return True
