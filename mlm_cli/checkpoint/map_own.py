"""Models that no architecture of transformers can hold: our own parameter names, and the model section as it is.

The folder has the Hub's shape (``config.json``, safetensors, tokenizer), so everything of ours opens it; transformers
does not know the ``model_type``, and says so.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from pydantic import ValidationError

from mlm_cli.checkpoint.key_map import ConfigReader, Entry, KeyMap
from mlm_cli.config.schema import ModelSection
from mlm_cli.errors import CheckpointError
from mlm_cli.models.registry import build_model
from mlm_cli.parallel.context import ParallelContext

MODEL_TYPE = "mlm"
# Heads of pretraining and of tasks: what a model without its head leaves to the task. Only causal models are held so.
HEADS = re.compile(r"(head|task)\..+")
_BOTH = {f"output.{part}": f"task.output.{part}" for part in ("weight", "bias")}
TASK_HEADS = {
    "ForSequenceClassification": {"output.weight": "task.output.weight"},
    "ForTokenClassification": _BOTH,
    "ForQuestionAnswering": _BOTH,
    "Model": {},
}


def architecture(model: ModelSection) -> str:
    """A name for the kind of model; no class of transformers."""
    return {"gpt": "MlmForCausalLM", "bert": "MlmForMaskedLM", "t5": "MlmForConditionalGeneration"}[model.family]


def read_config(config: ConfigReader) -> ModelSection:
    """The model section that ``write_config`` wrote."""
    values = config.get("model", dict)
    try:
        return ModelSection(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(("model", *map(str, first["loc"])))
        raise CheckpointError(f"{config.where}: {key}: {first['msg']}, got {first['input']!r}") from None


def write_config(model: ModelSection) -> dict[str, Any]:
    """``config.json`` entries."""
    return {
        "model_type": MODEL_TYPE,
        "model": model.model_dump(mode="json"),
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.seq_length,
    }


def key_map(model: ModelSection, config: ConfigReader | None = None) -> KeyMap:
    """Every parameter under its own name; a gated layer's two halves, or query, key and value, stay one tensor."""
    built = build_model(model, ParallelContext(device=torch.device("meta")), init=False)
    return KeyMap({name: Entry((name,)) for name, _ in built.named_parameters()}, "")
