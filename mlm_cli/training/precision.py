"""Which floating-point type training computes in."""

from __future__ import annotations

from typing import Literal

import torch

from mlm_cli.errors import UsageError


def has_fast_bf16(device: torch.device) -> bool:
    """Does the processor multiply bfloat16 matrices itself (AMX, AVX-512-BF16; compute capability 8.0)?"""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    named = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
    return any(bool(capabilities.get(name)) for name in named) or _probe(torch.cpu)


def _probe(module: object) -> bool:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        check = getattr(module, name, None)
        if check is not None and check():
            return True
    return False


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
