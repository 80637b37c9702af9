"""Joining and leaving the process group: the one place that reads the launcher's environment variables."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import torch


_RANK_LOST = 6  # DESIGN section 1
_joined = False  # this process has been in a process group


@dataclass(frozen=True)
class Env:
    """Who this process is. ``local_rank`` counts inside one machine and picks the GPU."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def pick_device(local_rank: int = 0) -> torch.device:
    """The GPU of this local rank where there is one (``MLM_DEVICE=cpu`` refuses it), else the CPU."""
    import torch

    if os.environ.get("MLM_DEVICE", "auto") != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def init(*, timeout_seconds: float = 1800.0) -> Env:
    """Join the process group described by RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*; alone, join nothing.

    One rank needs no group: collectives over a group of size 1 are identities (``parallel.context.Group``).
    """
    import torch

    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = pick_device(local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1 and not torch.distributed.is_initialized():
        store = _supervised_store(rank, world_size, timeout_seconds)
        _join(device, rank, world_size, store, timedelta(seconds=timeout_seconds))
    return Env(rank, world_size, local_rank, device)


def join_alone(device: torch.device) -> None:
    """A process group of this process alone, for frameworks that want one; nothing where there is a group already."""
    import torch

    if not torch.distributed.is_initialized():
        _join(device, 0, 1, torch.distributed.HashStore(), None)


def _join(
    device: torch.device,
    rank: int,
    world_size: int,
    store: torch.distributed.Store | None,
    timeout: timedelta | None,
) -> None:
    import torch

    global _joined
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout, store=store)
    _joined = True


def _supervised_store(rank: int, world_size: int, timeout_seconds: float) -> torch.distributed.Store | None:
    """The store of ranks that ``mlm --nproc`` started, on the socket it listens on; None: as the launcher has it."""
    if "MLM_SUPERVISED" not in os.environ:
        return None
    from torch.distributed import TCPStore

    patience = timedelta(seconds=timeout_seconds)
    door = os.environ.pop("MLM_MASTER_FD", None)  # the store closes it: its number may soon be another file's
    # A first rank that is stopped keeps the others waiting for its first word, whatever the timeout.
    first = threading.Timer(timeout_seconds, _leave, args=(world_size, timeout_seconds))
    first.daemon = True
    if rank > 0:
        first.start()
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=rank == 0,
        timeout=patience,
        wait_for_workers=False,
        master_listen_fd=int(door) if door is not None else None,
    )
    first.cancel()
    keys = [f"mlm-came-{number}" for number in range(world_size)]
    store.set(keys[rank], "")
    try:
        store.wait(keys, patience)
    except RuntimeError:
        missing = ", ".join(str(number) for number, key in enumerate(keys) if not store.check([key]))
        raise RuntimeError(f"timed out after {timeout_seconds:.0f} s: rank {missing} did not join") from None
    return store


def _leave(world_size: int, seconds: float) -> None:
    """In place of a main thread that does not come back."""
    sys.stderr.write(f"error: rank 0 of {world_size} did not join the others within {seconds:.0f} s\n")
    sys.stderr.flush()
    os._exit(_RANK_LOST)


def shutdown() -> None:
    """Leave the process group if one was joined."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process; if it was in a process group, without taking the interpreter apart.

    A thread of gloo or NCCL may let go of its last tensor late, and waits for the interpreter to do so. Before Python
    3.14, a thread that waits for an interpreter being taken apart is ended with its C++ frames on the stack, which
    aborts the process: a rank that has done its work would be told as lost. What others rely on at the end is done:
    threads are waited for, exit handlers run, output is flushed.
    """
    if not _joined:
        sys.exit(code)
    with contextlib.suppress(Exception):
        threading._shutdown()  # type: ignore[attr-defined]
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
