"""Fixtures shared by the whole suite: real test data, a small corpus, and ranks over gloo."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["MLM_DEVICE"] = os.environ.get("MLM_DEVICE", "cpu")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real public data; tests that need it skip where it is not."""
    folder = Path(os.environ.get("MLM_TEST_DATA", ROOT / ".." / "shared" / "data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"needs real test data; MLM_TEST_DATA={folder} is not a folder")
    return folder


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL corpus of real text: the docstring-rich sources of Python's own `json` and `email` packages."""
    import email
    import json

    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    folders = [Path(json.__file__).parent, Path(email.__file__).parent]
    with path.open("w", encoding="utf-8") as out:
        for folder in folders:
            for source in sorted(folder.glob("*.py")):
                out.write(json.dumps({"text": source.read_text(encoding="utf-8")}) + "\n")
    return path


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


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """``run_ranks(fn, world_size, *args)`` runs ``fn(rank, world_size, *args)`` on real processes joined over gloo.

    ``fn`` must be defined at the top of a module and return plain values or numpy arrays. Results come back in rank
    order; a failing rank fails the test with its traceback.
    """

    def run(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 180.0) -> list[Any]:
        import torch.multiprocessing as mp

        context = mp.get_context("spawn")
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

    return run
