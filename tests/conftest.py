"""Fixtures shared by the whole suite: real test data, a small corpus, and ranks over gloo."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["MLM_DEVICE"] = os.environ.get("MLM_DEVICE", "cpu")

# A shell starts what it puts into the background with Ctrl-C ignored, and so would be all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

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


@pytest.fixture(autouse=True)
def _talk_as_usual() -> Iterator[None]:
    """A command run in this process with ``--quiet`` or ``--verbose`` says nothing about the next test."""
    yield
    from mlm_cli import log

    log.setup()


@pytest.fixture(scope="session", name="run_ranks")
def run_ranks_fixture() -> Callable[..., list[Any]]:
    """``run_ranks(fn, world_size, *args)``: see ``tests/ranks.py``."""
    return run_ranks
