"""Small backbones of every layout, tasks of every kind and a batch, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mlm_cli.config.schema import ModelSection, TaskSection
from mlm_cli.data.tokenizer import Tokenizer, load_tokenizer
from mlm_cli.models.heads import TaskModel
from mlm_cli.models.registry import build_model
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.shard import gather_full, shard_of
from mlm_cli.tasks.encoding import TextEncoder
from mlm_cli.tasks.registry import TASKS
from mlm_cli.tasks.task import Task
from mlm_cli.tasks.task_folder import load_task_model, save_task_model

WORDS = ("the", "film", "was", "good", "bad", "a", "man", "plays", "guitar", "##s", "##ing", ",", ".", "in", "rome")
LABELS = {"classification": ("bad", "so so", "good"), "token_classification": ("B-LOC", "I-LOC", "O")}
_GPT2: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 32,
    "init_std": 0.3,
    "vocab_size": 120,
}
_BERT = {**_GPT2, "family": "bert", "num_token_types": 2}
SECTIONS = {
    "gpt2": ModelSection(**_GPT2),
    "llama": ModelSection(
        **_GPT2,
        position="rotary",
        norm="rmsnorm",
        activation="swiglu",
        bias=False,
        tie_embeddings=False,
        num_query_groups=2,
    ),
    "bert": ModelSection(**_BERT, norm_order="post", activation="gelu_erf", norm_eps=1e-12),
    "megatron-bert": ModelSection(**_BERT, binary_head="sentence_order"),
}


def wordpiece(folder: Path) -> Tokenizer:
    """A WordPiece tokenizer of some words, letters and BERT's special tokens."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(f"##{letter}" for letter in letters), *(str(digit) for digit in range(10))]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *pieces]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return load_tokenizer(folder)


def make_task(name: str, section: ModelSection, tokenizer: Tokenizer, **keys: Any) -> Task:
    if name == "embedding":
        keys.setdefault("text_pair_column", "text_pair")
    settings = TaskSection(name=name, train="train", dev="dev", **keys)  # type: ignore[arg-type]
    return TASKS[name](settings, TextEncoder(tokenizer, section, 32), LABELS.get(name, ()))


def make_model(layout: str, task: Task, parallel: ParallelContext | None = None, seed: int = 3) -> TaskModel:
    """A random model in which every weight matters."""
    backbone = build_model(SECTIONS[layout], parallel or ParallelContext.single(), seed=seed, head=False)
    model = TaskModel(backbone, task.head, seed=seed + 1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 1:  # biases, norms; equal on all tensor ranks only where they are whole
                param.add_(0.1)
            elif model.parallel.tensor.size == 1:
                param.add_(torch.empty_like(param).normal_(0, 0.02, generator=generator))
    return model.eval()


def make_batch(pad_id: int = 0) -> dict[str, torch.Tensor]:
    """Four rows of 1 to 12 tokens, padded on the right as transformers expects it; longer ones have a second text."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor([12, 1, 7, 4])
    tokens = torch.randint(5, 60, (4, 12), generator=generator)
    return {
        "tokens": tokens.masked_fill(torch.arange(12) >= lengths[:, None], pad_id),
        "lengths": lengths,
        "token_types": ((torch.arange(12) >= 3) & (torch.arange(12) < lengths[:, None])).long(),
    }


def outputs_and_gradients(
    rank: int, world_size: int, folder: str, cases: list[tuple[str, str]]
) -> dict[tuple[str, str], dict[str, Any]]:
    """For each (layout, task) under ``folder``: outputs, whole gradients of head and sliced layers; saves again."""
    parallel = ParallelContext.create(tensor=world_size)
    tokenizer = load_tokenizer(Path(folder) / "tok")
    found = {}
    for layout, name in cases:
        task = make_task(name, SECTIONS[layout], tokenizer)
        place = Path(folder) / layout / name
        model = load_task_model(place, parallel, task.head).eval()
        outputs = model(make_batch())
        (outputs * torch.linspace(-1, 1, outputs.numel()).view(outputs.shape)).sum().backward()
        values = {"outputs": outputs.detach().numpy()}
        for key, param in model.named_parameters():
            if key.startswith("head.") or key.endswith(("0.attention.qkv.weight", "1.mlp.down.weight")):
                assert param.grad is not None
                values[key] = gather_full(param.grad, shard_of(param), parallel.tensor).numpy()
        save_task_model(model, task, place / f"again{world_size}")
        found[layout, name] = values
    return found
