"""Which floating-point type training computes in."""

from __future__ import annotations

from typing import Literal

import torch

from mlm_cli.errors import UsageError
from mlm_cli.ops import products


def has_fast_bf16(device: torch.device) -> bool:
    """Does the processor multiply bfloat16 matrices itself (AMX, AVX-512-BF16; compute capability 8.0)?"""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return products.has_products(torch.bfloat16)


def choose_dtype(wanted: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> torch.dtype:
    """The type of weights and activations; masters and moments are float32 in any case.

    Raises:
        UsageError: bfloat16 on a GPU that cannot.
    """
    if wanted == "auto":
        wanted = "bf16" if has_fast_bf16(device) else "fp32"
    if wanted == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UsageError(f"{torch.cuda.get_device_name(device)} has no bfloat16", hint="set train.precision=fp32")
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(wanted, torch.float32)
