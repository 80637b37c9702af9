"""What wrote an answer, for those who meet it later: enough to find the model, and to write the answer again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlm_cli.generation.answer import Settings


@dataclass(frozen=True)
class Provenance:
    """Of all answers of a run.

    Attributes:
        facts: of the model and the tool, in the order in which they are written.
    """

    facts: Mapping[str, Any]

    def record(self, settings: Settings) -> dict[str, Any]:
        """As plain values; of a watermark all but its key."""
        rule, mark = settings.sampling, settings.sampling.watermark
        way: dict[str, Any] = {"repetition_penalty": rule.repetition_penalty}
        if settings.contrastive_alpha:
            way |= {"contrastive_alpha": settings.contrastive_alpha, "top_k": rule.top_k}
        elif settings.beams > 1:
            way |= {"beams": settings.beams, "length_penalty": settings.length_penalty}
        elif rule.greedy:
            way |= {"temperature": 0.0}
        else:
            way |= {"temperature": rule.temperature, "top_k": rule.top_k, "top_p": rule.top_p, "seed": rule.seed}
        marked = mark and {"scheme": mark.scheme, "context": mark.context, "ratio": mark.ratio, "bias": mark.bias}
        return {
            **self.facts,
            "max_new_tokens": settings.max_new_tokens,
            "stop": list(settings.stops),
            **way,
            "watermark": marked,
        }
