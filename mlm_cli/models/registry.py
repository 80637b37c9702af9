"""The model families by name."""

from __future__ import annotations

import torch

from mlm_cli.config.schema import ModelSection
from mlm_cli.models.bert import Bert
from mlm_cli.models.gpt import GPT
from mlm_cli.models.model import Model
from mlm_cli.models.stages import balance, layer_costs
from mlm_cli.models.t5 import T5
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.random import initialize

FAMILIES = {"gpt": GPT, "bert": Bert, "t5": T5}


def build_model(
    model: ModelSection,
    parallel: ParallelContext,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 1234,
    init: bool = True,
    head: bool = True,
) -> Model:
    """Build this rank's slice of a model, and its stage where ``parallel.pipeline`` has several.

    Args:
        model: architecture, ``vocab_size`` set.
        dtype: of weights and activations.
        seed: initial weights are a function of it and the parameter's name, whatever the layout.
        init: False leaves weights unfilled (they will be loaded).
        head: False leaves the head of pretraining out, for a task's (``models.heads``).
    """
    part = None
    if parallel.pipeline.size > 1:
        part = balance(layer_costs(model), parallel.pipeline.size)[parallel.pipeline.rank]
    built = FAMILIES[model.family](model, parallel, dtype, part, head)
    if init:
        initialize(built, parallel, seed)
    return built


def build_gpt(model: ModelSection, parallel: ParallelContext, **options: object) -> GPT:
    """``build_model`` of the gpt family."""
    built = build_model(model, parallel, **options)  # type: ignore[arg-type]
    assert isinstance(built, GPT)
    return built
