"""The original, post-norm BERT as transformers' ``BertForPreTraining`` or ``BertForMaskedLM``, and back."""

from __future__ import annotations

from typing import Any

from mlm_cli.checkpoint.key_map import ConfigReader, KeyMap
from mlm_cli.checkpoint.map_encoder import HEADS, TASK_HEADS, encoder_map, read_encoder, write_encoder
from mlm_cli.config.schema import ModelSection

__all__ = ["HEADS", "MODEL_TYPE", "TASK_HEADS", "architecture", "key_map", "read_config", "write_config"]

MODEL_TYPE = "bert"


def architecture(model: ModelSection) -> str:
    """transformers' class for a model of this layout."""
    return "BertForMaskedLM" if model.binary_head == "none" else "BertForPreTraining"


def read_config(config: ConfigReader) -> ModelSection:
    """The model section of a BERT ``config.json``."""
    return read_encoder(config, norm_order="post", binary_head="next_sentence")


def write_config(model: ModelSection) -> dict[str, Any]:
    """``config.json`` entries of a model section that ``hub_layout`` found to be BERT's."""
    return {"model_type": MODEL_TYPE, **write_encoder(model)}


def key_map(model: ModelSection, config: ConfigReader | None = None) -> KeyMap:
    """Parameter names; each branch's norm lies with the branch that ends in it."""
    return encoder_map(
        model,
        {"norm1": "attention.output.LayerNorm", "norm2": "output.LayerNorm"},
        {"embedding.norm": "bert.embeddings.LayerNorm"},
    )
