"""Helpers of the preprocessing tests: small runs, in this process or as a command of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mlm_cli.data.indexed import IndexedDataset
from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.jobs.preprocess import run
from mlm_cli.jobs.preprocess_plan import PreprocessRequest

ROOT = Path(__file__).resolve().parents[2]
MLM = [sys.executable, "-c", "from mlm_cli.cli.app import main; main()"]


def jsonl(path: Path, documents: Iterable[Any], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in documents), encoding="utf-8")
    return path


def preprocess(*inputs: Path | str, output: Path, tokenizer: str = "bytes", **settings: Any) -> dict[str, Any]:
    request = PreprocessRequest(tuple(map(str, inputs)), tokenizer, str(output), **{"workers": 1, **settings})
    return run(request)


def texts(prefix: Path | str, tokenizer: str = "bytes") -> list[str]:
    """Documents of a set, decoded, with the end of document as `|`."""
    dataset, known = IndexedDataset(prefix), load_tokenizer(tokenizer)
    found = []
    for number in range(dataset.num_documents):
        ids = dataset.document(number).tolist()
        assert ids == [] or known.eod_id is None or ids.count(known.eod_id) <= 1
        found.append(known.decode([i for i in ids if i != known.eod_id]) + ("|" if known.eod_id in ids else ""))
    return found


def origins(prefix: Path) -> list[tuple[int, int]]:
    return [(int(source), int(line)) for source, line in np.load(f"{prefix}.origins.npy")]


def command(*arguments: str, cwd: Path, timeout: float = 60, **settings: Any) -> subprocess.CompletedProcess[str]:
    """`mlm ARGUMENTS` as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*MLM, *arguments], cwd=cwd, timeout=timeout, text=True, capture_output=True, env=environment, **settings
    )
