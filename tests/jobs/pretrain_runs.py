"""Tiny data, tiny recipes and fingerprints of what a run left, for the tests of `mlm pretrain`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from mlm_cli.config.schema import Recipe
from mlm_cli.data.indexed import IndexedWriter

VOCAB = 96


def write_data(prefix: Path, *, documents: int = 60, seed: int = 0) -> Path:
    """Documents that repeat a short motif, so that a model can learn something in a few steps."""
    generator = np.random.default_rng(seed)
    writer = IndexedWriter(f"{prefix}_text_document", np.uint16)
    for _ in range(documents):
        motif = generator.integers(0, VOCAB, 6)
        writer.add_sequence(np.tile(motif, int(generator.integers(8, 40))).astype(np.uint16))
        writer.end_document()
    writer.finish()
    return prefix


def make_recipe(data: Path, output: Path, **changes: Any) -> Recipe:
    """Two layers of 32, dropout on, 12 steps of 4 samples in micro-batches of 1; ``changes`` by dotted key."""
    values: dict[str, Any] = {
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "seq_length": 16,
            "vocab_size": VOCAB,
            "make_vocab_size_divisible_by": 32,
            "hidden_dropout": 0.1,
            "attention_dropout": 0.1,
        },
        "data": {"path": str(data), "split": "80,20,0"},
        "train": {"steps": 12, "micro_batch_size": 1, "global_batch_size": 4, "precision": "fp32"},
        "optimizer": {"lr": 3e-3, "weight_decay": 0.1},
        "schedule": {"warmup_steps": 3, "decay_steps": 12},
        "checkpoint": {"every": 0, "keep_last": 0},
        "evaluate": {"every": 6, "batches": 2},
        "log": {"every": 1, "tensorboard": False},
        "seed": 7,
        "output": str(output),
    }
    for key, value in changes.items():
        section, _, last = key.replace("__", ".").rpartition(".")
        (values[section] if section else values)[last] = value
    return Recipe.model_validate(values)


def fingerprints(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every file of ``model/`` and ``state/``."""
    files = sorted(path for part in ("model", "state") for path in (checkpoint / part).rglob("*") if path.is_file())
    return {str(path.relative_to(checkpoint)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in metrics(run)]


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())
