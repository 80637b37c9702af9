"""Model folders shared by the tests of generation."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import transformers

from tests.generation.folders import save_folder

TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 20,
    "naïve café — 東京 🙂 " * 40,
    "def f(x):\n    return x\n" * 30,
]


class Pair(NamedTuple):
    """A model folder and the same model in `transformers`."""

    folder: Path
    model: transformers.PreTrainedModel
    kind: str


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp(request.param)
    return Pair(folder, save_folder(folder, request.param, TEXTS), request.param)
