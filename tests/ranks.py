"""Real ranks over gloo for tests; a module of its own, so that spawned processes can import it by name."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any


def free_port() -> int:
    """A port on the loopback that nobody listened on a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _rank_main(
    rank: int, world_size: int, port: int, fn: Callable[..., Any], args: tuple[Any, ...], results: Any
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
    )
    import torch

    torch.set_num_threads(1)
    from mlm_cli import distributed

    try:
        distributed.init(timeout_seconds=120)
        results.put((rank, True, fn(rank, world_size, *args)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    finally:
        distributed.shutdown()


_PRELOADED = ["torch", "torch._dynamo", "deepspeed", "mlm_cli.jobs.pretrain", "mlm_cli.jobs.finetune"]
_LEFT_BEHIND = (
    "PYTEST_CURRENT_TEST", "LOCAL_RANK", "DS_ACCELERATOR", "KMP_INIT_AT_FORK", "KMP_DUPLICATE_LIB_OK", "TYPER_USE_RICH",
    "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
)  # fmt: skip
_environment: dict[str, str] = {}  # of the server that ranks are forked from


def _context() -> Any:
    """How processes are started: forked from one that has imported what takes seconds, or anew.

    What is imported may have looked at the environment, so a test that changes it gets new processes. What a run in
    this very process leaves behind is set anew in each rank; what scikit-learn (settings of Intel's OpenMP), torch's
    compiler and our command line leave behind is nothing to ranks.
    """
    import torch.multiprocessing as mp

    now = {key: value for key, value in os.environ.items() if key not in _LEFT_BEHIND}
    if _environment and now != _environment:
        return mp.get_context("spawn")
    _environment.update(now)
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 180.0) -> list[Any]:
    """Run ``fn(rank, world_size, *args)`` on real processes joined over gloo; answers in rank order.

    ``fn`` must be defined at the top of a module and return plain values or numpy arrays. A failing rank fails the test
    with its traceback.
    """
    context = _context()
    results = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_rank_main, args=(rank, world_size, port, fn, args, results))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        answers = [results.get(timeout=timeout) for _ in processes]
    finally:
        for process in processes:
            process.join(timeout=20)
            if process.is_alive():
                process.kill()
    failed = [f"rank {rank}:\n{answer}" for rank, ok, answer in answers if not ok]
    assert not failed, "\n".join(failed)
    return [answer for _, _, answer in sorted(answers, key=lambda item: item[0])]
