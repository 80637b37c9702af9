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
# The other families: T5, whose words and tables of positions are tied over stages; BERT, pre-norm with sentence order
# and post-norm with the next sentence; a GPT with a mixture of experts in every other layer.
_EVERY_FAMILY = (
    "t2", "t2 sequence", "p2", "d2 zero 1", "d2 zero 2", "d2 zero 3", "t4", "p4", "t2 p2", "t2 d2 zero 1",
    "t2 d2 zero 3", "p2 d2 zero 1", "t2 p2 d2 zero 1",
)  # fmt: skip
ROWS |= {f"{family} {name}": ROWS[name] for family in ("t5", "bert", "experts") for name in _EVERY_FAMILY}
ROWS |= {f"bert-post {name}": ROWS[name] for name in ("t2 sequence", "p2", "d2 zero 3", "t2 p2")}
REFERENCE_NAMES = ("reference", *(f"{family} reference" for family in ("t5", "bert", "bert-post", "experts")))
REFERENCES = [(name, "none") for name in REFERENCE_NAMES]
RECOMPUTE = ("none", "full")
_MODELS: dict[str, dict[str, Any]] = {
    "gpt": {},
    "bert": {"family": "bert", "num_token_types": 2, "binary_head": "sentence_order"},
    "bert-post": {"family": "bert", "num_token_types": 2, "binary_head": "next_sentence", "norm_order": "post"},
    "experts": {"experts": {"num_experts": 4, "top_k": 2, "every": 2, "balance_loss": 0.1}},
}
_MODELS["t5"] = {
    "family": "t5",
    "num_layers": 2,
    "head_dim": 16,
    "position": "relative",
    "relative_buckets": 8,
    "relative_max_distance": 16,
    "norm": "rmsnorm",
    "activation": "relu",
    "bias": False,
}


# T5's stages have parameter groups of their own each: the embedding is on the first one.
_RATES: dict[str, dict[str, Any]] = {"t5": {"lr": 3e-4, "lr_scaling": "initial_std"}}


@dataclass(frozen=True)
class Distance:
    """Largest difference from the run of one rank, relative: of losses, of gradient norms, of the final weights."""

    loss: float
    grad_norm: float
    weights: float


def make_recipe(data: str, output: Path, parallel: dict[str, Any], recompute: str, family: str = "gpt") -> Any:
    from mlm_cli.config.schema import Recipe

    return Recipe.model_validate(
        {
            "model": {
                "num_layers": 4,
                # heads of 16 and 64 tokens: what the kernel for attention on the CPU takes
                "hidden_size": 64,
                "num_attention_heads": 4,
                "seq_length": 64,
                "vocab_size": 90,
                "make_vocab_size_divisible_by": 32,
                **_MODELS[family],
            },
            "tokenizer": str(Path(data).parent / "tokenizer") if family.startswith(("t5", "bert")) else None,
            "data": {"path": data, "split": "80,20,0"},
            "train": {
                "steps": STEPS,
                "micro_batch_size": 2,
                "global_batch_size": 8,
                "precision": "fp32",
                "recompute": recompute,
            },
            # A key's bias has no gradient; a larger eps keeps AdamW from blowing up its rounding errors.
            "optimizer": {"weight_decay": 0.1, "eps": 1e-5, **_RATES.get(family, {"lr": 3e-3})},
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
        sentence = generator.integers(0, 90, 6).astype(np.uint16)
        for _ in range(int(generator.integers(8, 40))):
            writer.add_sequence(sentence)
        writer.end_document()
    writer.finish()
    write_tokenizer(prefix.parent / "tokenizer")
    return str(prefix)


def write_tokenizer(folder: Path) -> None:
    """90 words, the first of them T5's and BERT's special tokens."""
    special = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{number}>" for number in range(8))]
    special += ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *(f"w{number}" for number in range(len(special), 90))]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    definition = {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": token, **flags} for number, token in enumerate(special)],
        "model": {"type": "WordLevel", "vocab": {word: n for n, word in enumerate(words)}, "unk_token": "<unk>"},
    }
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")


def family_of(name: str) -> str:
    first = name.split()[0]
    return first if first in _MODELS else "gpt"


def ways(name: str) -> tuple[str, ...]:
    """How a row is run. On two ranks, where the test is quick, families beside GPT run with recomputation alone."""
    return ("full",) if family_of(name) != "gpt" and ROWS[name][0] == 2 else RECOMPUTE


def runs_of(size: int) -> list[tuple[str, str]]:
    """Name and recomputation of all rows of so many ranks."""
    return [(name, how) for name, (ranks, _) in ROWS.items() if ranks == size for how in ways(name)]


def run_rows(rank: int, size: int, data: str, folder: str, runs: list[tuple[str, str]]) -> None:
    """On every rank: each run, one after the other."""
    from mlm_cli import distributed
    from mlm_cli.jobs import pretrain

    distributed.shutdown = lambda: None  # type: ignore[assignment] # several runs in one process group
    for name, how in runs:
        output = Path(folder) / f"{name} {how}".replace(" ", "-")
        parallel = {} if name in REFERENCE_NAMES else ROWS[name][1]
        assert pretrain.run(make_recipe(data, output, parallel, how, family_of(name))) == 0


def distance(folder: Path, name: str, how: str) -> Distance:
    """A finished row against the finished reference."""
    from safetensors.numpy import load_file

    family = family_of(name)
    reference = "reference none" if family == "gpt" else f"{family} reference none"
    runs = [folder / f"{label}".replace(" ", "-") for label in (f"{name} {how}", reference)]
    metrics = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    assert [len(records) for records in metrics] == [STEPS, STEPS]
    found = {
        key: max(abs(mine[key] - other[key]) / other[key] for mine, other in zip(*metrics, strict=True))
        for key in ("loss", "grad_norm")
    }
    mine, other = (load_file(run / f"step-{STEPS:08d}" / "model" / "model.safetensors") for run in runs)
    assert mine.keys() == other.keys()
    # A key's bias has no gradient; where it is a tensor of its own (BERT), all it holds is rounding.
    apart = [float(np.abs(mine[key] - other[key]).max() / max(np.abs(other[key]).max(), 1e-3)) for key in other]
    return Distance(found["loss"], found["grad_norm"], max(apart))


def page(found: dict[tuple[str, str], Distance]) -> str:
    lines = [
        "# Layouts",
        "",
        "The same recipe learns the same model however it is spread. Made by `python tests/numerics/layout_rows.py`",
        "and held by `tests/numerics/test_layouts.py`: 20 steps in float32 on CPU ranks over gloo of a GPT of 4 layers",
        "or, where it says so, a T5 of 2 + 2, a BERT of 4 (bert-post: post-norm), or a GPT with experts in every other",
        "layer; largest relative difference from one rank. Bounds: loss and gradient norm 1e-5, final weights in",
        "`model/` 1e-4 of each tensor's largest.",
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
        launch(run_rows, 1, data, place, REFERENCES)
        for size in sorted({ranks for ranks, _ in ROWS.values()}):
            launch(run_rows, size, data, place, runs_of(size), timeout=900.0)
        PAGE.write_text(page({(name, how): distance(folder, name, how) for name in ROWS for how in ways(name)}))


if __name__ == "__main__":
    main()
