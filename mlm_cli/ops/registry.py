"""Loads the compiled kernels and answers, for every operator, which backend runs and why.

Nothing is compiled here: ``make build`` (``python -m mlm_cli.ops.build``) does that. A library that is missing, stale
or refuses to load never stops anyone: the plain-torch reference runs, after one warning.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from mlm_cli import log
from mlm_cli.ops.compiler import LIBRARY_FOLDER, BuildError, schema_id, source_folder

OPERATORS = (
    "layer_norm",
    "rms_norm",
    "residual_norm",
    "scaled_masked_softmax",
    "scaled_causal_softmax",
    "interval_attention",
    "sparse_attention",
    "bias_gelu",
    "swiglu",
    "cross_entropy",
    "adamw_",
    "decode_step",
    "shared_all_reduce_",
    "shared_all_gather_",
)
# Operators without a CUDA kernel, and what serves there instead.
CPU_ONLY = {
    "decode_step": "the layers run one by one",
    "interval_attention": "torch's fused attention",
    "shared_all_reduce_": "NCCL",
    "shared_all_gather_": "NCCL",
}

cpu_loaded = False
cuda_loaded = False
cpu_reason = ""
cuda_reason = ""
_warned = False


def forced_reference() -> bool:
    """``MLM_OPS=reference`` was set when this module was imported."""
    return os.environ.get("MLM_OPS", "auto") == "reference"


def _load(library: Path) -> str | None:
    """None when loaded, else why not."""
    if not library.is_file():
        return "not built: run `make build` (`python -m mlm_cli.ops.build`)"
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as failure:
        reason = failure.__cause__ or failure  # torch says which library, the loader says why
        return f"`{library.name}` does not load: {str(reason).splitlines()[0]}"
    return None


def _schemas_differ() -> bool:
    try:
        expected = schema_id(source_folder())
    except BuildError:  # installed without sources: nothing to compare with
        return False
    try:
        return bool(torch.ops.mlm.schema_id() != expected)
    except (AttributeError, RuntimeError):  # older than the check itself
        return True


def load() -> None:
    """Load what is there; called once, when ``mlm_cli.ops`` is imported."""
    global cpu_loaded, cuda_loaded, cpu_reason, cuda_reason
    if forced_reference():
        cpu_reason = cuda_reason = "MLM_OPS=reference asks for it"
        return
    failure = _load(LIBRARY_FOLDER / "libmlm_cpu.so")
    if failure is None and _schemas_differ():
        failure = "the built library is from other sources: run `make build`"
    cpu_loaded = failure is None
    cpu_reason = failure or f"compiled kernels, {cpu_capability()}"
    if not cpu_loaded:
        cuda_reason = f"needs the CPU library: {failure}"
    elif not torch.cuda.is_available():
        cuda_reason = "torch sees no CUDA device"
    else:
        failure = _load(LIBRARY_FOLDER / "libmlm_cuda.so")
        cuda_loaded = failure is None
        cuda_reason = failure or f"compiled kernels on {torch.cuda.get_device_name()}"


def cpu_capability() -> str:
    """Instruction set the loaded CPU kernels chose for this processor."""
    return ("baseline instructions", "AVX2", "AVX-512", "AVX-512 with BF16")[torch.ops.mlm.cpu_level()]


def serves(x: Tensor) -> bool:
    """True when a compiled kernel takes this tensor; says once why not when a build could help."""
    if x.is_cpu:
        return cpu_loaded or _missing(cpu_reason)
    if x.is_cuda:
        if x.dtype == torch.float64:  # float64 is for gradient checks, which run on the CPU
            return False
        return cuda_loaded or _missing(cuda_reason)
    return False


def _missing(reason: str) -> bool:
    global _warned
    if not _warned and not forced_reference() and not torch.compiler.is_compiling():
        _warned = True
        log.warn(f"fused kernels are not used, the plain-torch reference runs instead: {reason}")
    return False


def status() -> list[dict[str, str]]:
    """One ``{name, backend, reason}`` per operator; backend is ``cuda``, ``cpu`` or ``reference``.

    ``cuda`` means that tensors on the GPU have a kernel (those on the CPU do too then).
    """
    if cuda_loaded:
        backend, reason = "cuda", cuda_reason
    elif cpu_loaded:
        backend, reason = "cpu", f"{cpu_reason}; cuda: {cuda_reason}"
    else:
        backend, reason = "reference", cpu_reason
    rows = [{"name": name, "backend": backend, "reason": reason} for name in OPERATORS]
    for row in rows:
        if row["name"] in CPU_ONLY and cuda_loaded:
            row.update(backend="cpu", reason=f"{cpu_reason}; cuda: {CPU_ONLY[row['name']]}")
        if row["name"] == "sparse_attention":
            row["reason"] += "; FlexAttention for whole passes on a GPU, else blocks round the softmax kernels"
    return rows
