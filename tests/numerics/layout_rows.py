"""The same tiny recipe at every layout; ``python tests/numerics/layout_rows.py`` writes docs/layouts.md."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "layouts.md"
STEPS = 20

# ranks, and the `parallel` section
ROWS: dict[str, tuple[int, dict[str, Any]]] = {
    "t2": (2, {"tensor": 2}),
    "t2 sequence": (2, {"tensor": 2, "sequence": True}),
    "p2": (2, {"pipeline": 2}),
    "d2 zero 1": (2, {"zero": 1}),
    "d2 zero 2": (2, {"zero": 2}),
    "d2 zero 3": (2, {"zero": 3}),
    "d2 zero 3 offload": (2, {"zero": 3, "offload": "cpu"}),
    "c2": (2, {"context": 2}),
    "c2 zero 3": (2, {"context": 2, "zero": 3}),
    "t4": (4, {"tensor": 4}),
    "p4": (4, {"pipeline": 4}),
    "t2 p2": (4, {"tensor": 2, "pipeline": 2}),
    "t2 p2 sequence": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "t2 d2 zero 1": (4, {"tensor": 2, "zero": 1}),
    "t2 d2 zero 3": (4, {"tensor": 2, "zero": 3}),
    "p2 d2 zero 1": (4, {"pipeline": 2, "zero": 1}),
    "c4": (4, {"context": 4}),
    "t2 c2": (4, {"tensor": 2, "context": 2}),
    "t2 c2 sequence": (4, {"tensor": 2, "context": 2, "sequence": True}),
    "p2 c2": (4, {"pipeline": 2, "context": 2}),
    "c2 d2 zero 1": (4, {"context": 2, "zero": 1}),
    "c2 d2 zero 0": (4, {"context": 2, "zero": 0}),
    "t2 p2 d2 zero 1": (8, {"tensor": 2, "pipeline": 2, "zero": 1}),
}
RECOMPUTE = ("none", "full")


@dataclass(frozen=True)
class Distance:
    """Largest difference from the run of one rank, relative: of losses, of gradient norms, of the final weights."""

    loss: float
    grad_norm: float
    weights: float


def make_recipe(data: str, output: Path, parallel: dict[str, Any], recompute: str) -> Any:
    from mlm_cli.config.schema import Recipe

    return Recipe.model_validate(
        {
            "model": {
                "num_layers": 4,
                "hidden_size": 32,
                "num_attention_heads": 4,
                "seq_length": 16,
                "vocab_size": 90,
                "make_vocab_size_divisible_by": 32,
            },
            "data": {"path": data, "split": "80,20,0"},
            "train": {
                "steps": STEPS,
                "micro_batch_size": 2,
                "global_batch_size": 8,
                "precision": "fp32",
                "recompute": recompute,
            },
            # A key's bias has no gradient; a larger eps keeps AdamW from blowing up its rounding errors.
            "optimizer": {"lr": 3e-3, "weight_decay": 0.1, "eps": 1e-5},
            "schedule": {"warmup_steps": 3},
            "parallel": parallel,
            "checkpoint": {"every": 0},
            "evaluate": {"every": 0},
            "log": {"every": 1, "tensorboard": False},
            "output": str(output),
        }
    )


def write_data(prefix: Path) -> str:
    from mlm_cli.data.indexed import IndexedWriter

    generator = np.random.default_rng(0)
    writer = IndexedWriter(f"{prefix}_text_document", np.uint16)
    for _ in range(60):
        writer.add_sequence(np.tile(generator.integers(0, 90, 6), int(generator.integers(8, 40))).astype(np.uint16))
        writer.end_document()
    writer.finish()
    return str(prefix)


def run_rows(rank: int, size: int, data: str, folder: str, names: list[str], recompute: list[str]) -> None:
    """On every rank: each row, one after the other."""
    from mlm_cli import distributed
    from mlm_cli.jobs import pretrain

    distributed.shutdown = lambda: None  # type: ignore[assignment] # several runs in one process group
    for name in names:
        for how in recompute:
            output = Path(folder) / f"{name} {how}".replace(" ", "-")
            parallel = {} if name == "reference" else ROWS[name][1]
            assert pretrain.run(make_recipe(data, output, parallel, how)) == 0


def distance(folder: Path, name: str, how: str) -> Distance:
    """A finished row against the finished reference."""
    from safetensors.numpy import load_file

    runs = [folder / f"{label}".replace(" ", "-") for label in (f"{name} {how}", "reference none")]
    metrics = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    assert [len(records) for records in metrics] == [STEPS, STEPS]
    found = {
        key: max(abs(mine[key] - other[key]) / other[key] for mine, other in zip(*metrics, strict=True))
        for key in ("loss", "grad_norm")
    }
    mine, other = (load_file(run / f"step-{STEPS:08d}" / "model" / "model.safetensors") for run in runs)
    assert mine.keys() == other.keys()
    apart = [float(np.abs(mine[key] - other[key]).max() / max(np.abs(other[key]).max(), 1e-30)) for key in other]
    return Distance(found["loss"], found["grad_norm"], max(apart))


def page(found: dict[tuple[str, str], Distance]) -> str:
    lines = [
        "# Layouts",
        "",
        "The same recipe learns the same model however it is spread. Made by `python tests/numerics/layout_rows.py`",
        "and held by `tests/numerics/test_layouts.py`: a GPT of 4 layers, 20 steps in float32 on CPU ranks over gloo;",
        "largest relative difference from one rank. Bounds: loss and gradient norm 1e-5, final weights in `model/`",
        "1e-4 of each tensor's largest.",
        "",
        "t tensor, p pipeline, c context, d data; sequence: `parallel.sequence`; offload: `parallel.offload` cpu;",
        "recompute: `train.recompute`.",
        "",
        "| layout | ranks | recompute | loss | gradient norm | weights |",
        "|---|---|---|---|---|---|",
    ]
    for (name, how), row in found.items():
        lines.append(f"| {name} | {ROWS[name][0]} | {how} | {row.loss:.0e} | {row.grad_norm:.0e} | {row.weights:.0e} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    import tempfile

    sys.path.insert(0, str(ROOT / "tests"))
    from ranks import run_ranks as launch

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data = write_data(folder / "data")
        launch(run_rows, 1, data, place, ["reference"], ["none"])
        for size in sorted({ranks for ranks, _ in ROWS.values()}):
            names = [name for name, (ranks, _) in ROWS.items() if ranks == size]
            launch(run_rows, size, data, place, names, list(RECOMPUTE), timeout=900.0)
        PAGE.write_text(page({(name, how): distance(folder, name, how) for name in ROWS for how in RECOMPUTE}))


if __name__ == "__main__":
    main()
