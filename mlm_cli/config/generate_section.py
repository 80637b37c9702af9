"""The ``generate`` section of a recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mlm_cli.config.section import Beams, LengthPenalty, Section


def _reference(value: Any) -> str:
    """The key is secret: a recipe, which is printed and saved, only says where it is."""
    kind, _, name = str(value).partition(":")
    if kind not in ("env", "file") or not name:
        raise ValueError("env:NAME or file:PATH, for a secret does not belong into a recipe or a command line")
    return f"file:{os.path.abspath(Path(name).expanduser())}" if kind == "file" else str(value)  # noqa: PTH100


WatermarkKey = Annotated[str, BeforeValidator(_reference)]


class GenerateSection(Section):
    """How `mlm generate` chooses its answers; its flags win over these keys."""

    max_new_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=1.0, ge=0, description="0: greedy")
    top_k: int = Field(default=0, ge=0, description="0 keeps every token")
    top_p: float = Field(default=1.0, gt=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0)
    beams: Beams = 1
    length_penalty: LengthPenalty = 1.0
    contrastive_alpha: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="of a contrastive search among the `top_k` likeliest tokens: weight of being unlike the text so far"
        " (0.6 is usual, with a top_k of 4 to 8); 0: none",
    )
    stop: tuple[str, ...] = ()
    batch_size: int = Field(default=8, ge=1)
    as_trained: bool = Field(
        default=True, description="put prompts between the prefix and suffix that the model was fine-tuned with"
    )
    watermark_bias: float = Field(
        default=0.0,
        ge=0,
        le=100,
        description="delta of a watermark (Kirchenbauer et al. 2023): added to the logits of each step's green tokens"
        " (2 is usual); 0: none",
    )
    watermark_ratio: float = Field(
        default=0.25, gt=0, lt=1, description="gamma of the watermark: share of the vocabulary that is green"
    )
    watermark_scheme: Literal["lefthash", "selfhash"] = Field(
        default="lefthash",
        description="what seeds a green list; lefthash: the last token; selfhash: the last tokens and the chosen one",
    )
    watermark_context: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="selfhash: tokens that seed a list, the chosen one among them; unset: 4 (lefthash: always 1)",
    )
    watermark_key: WatermarkKey | None = Field(
        default=None, description="where the watermark's secret key is, a whole number: env:NAME or file:PATH"
    )
    provenance: bool = Field(
        default=False, description="say in each JSON answer what wrote it: model, weights, settings, watermark"
    )
