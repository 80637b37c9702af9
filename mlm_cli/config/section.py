"""What all sections of a recipe have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MOST_CANDIDATES = 128  # continuations of a text that a search follows: each is a row of the decoder
Beams = Annotated[
    int,
    Field(
        ge=1,
        le=MOST_CANDIDATES,
        description="hypotheses of a beam search, which looks for the likeliest text; 1: none",
    ),
]
LengthPenalty = Annotated[
    float,
    Field(
        ge=-10,
        le=10,
        description="of a beam search: scores are divided by length to this power; above 0: longer texts",
    ),
]


class Section(BaseModel):
    """A group of recipe keys: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
