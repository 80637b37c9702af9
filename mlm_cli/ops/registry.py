"""Which kernels exist on this machine, and why."""

from __future__ import annotations

OPERATORS = (
    "layer_norm",
    "rms_norm",
    "residual_norm",
    "scaled_masked_softmax",
    "scaled_causal_softmax",
    "bias_gelu",
    "swiglu",
    "cross_entropy",
    "adamw_",
)


def status() -> list[dict[str, str]]:
    """One ``{name, backend, reason}`` per operator; backend is ``cuda``, ``cpu`` or ``reference``."""
    return [{"name": name, "backend": "reference", "reason": "kernels are not built"} for name in OPERATORS]
