"""What `mlm doctor` reports: enough to reproduce a problem, nothing private; made to be pasted into an issue."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from typing import Any

from mlm_cli import __version__

REQUIRED = (
    "torch",
    "deepspeed",
    "tokenizers",
    "datasets",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "pydantic",
    "pyyaml",
    "typer",
    "rich",
)
# distribution -> (extra that brings it, what it is for); as in pyproject.toml
OPTIONAL = {
    "gigatoken": ("fast", "BPE many times faster"),
    "zstandard": ("data", ".zst input"),
    "py3langid": ("data", "cleaning by language"),
    "phonenumbers": ("pii", "telephone numbers in text"),
    "sentencepiece": ("sentencepiece", "SentencePiece .model files"),
    "scikit-learn": ("eval", "scores beyond accuracy and F1"),
    "sacrebleu": ("eval", "BLEU and chrF of translations"),
    "rouge-score": ("eval", "ROUGE of summaries"),
    "lm-eval": ("harness", "mlm evaluate --task lm_eval:NAME"),
    "transformers": ("hf", "opening our models elsewhere"),
    "tensorboard": ("log", "TensorBoard curves"),
    "uvicorn": ("serve", "mlm generate --serve"),
}
VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME", "MLM_DEVICE", "MLM_OPS", "HF_HUB_OFFLINE", "HF_HOME", "TORCH_CUDA_ARCH_LIST",
)  # fmt: skip


def examine() -> dict[str, Any]:
    """The whole report, as plain values. Fields that cannot be found out are None."""
    return {
        "mlm": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in REQUIRED},
        "optional": [
            {
                "name": name,
                "version": _version(name),
                "extra": extra,
                "purpose": purpose,
                "install": _install(name, extra),
            }
            for name, (extra, purpose) in OPTIONAL.items()
        ],
        "cpu": _cpu(),
        "devices": _devices(),
        "distributed": _distributed(),
        "kernels": _kernels(),
        "tools": {name: shutil.which(name) for name in ("g++", "ninja", "nvcc", "srun", "mpirun", "pdsh")},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _install(name: str, extra: str) -> str | None:
    """The command that brings a missing package."""
    return None if _version(name) else f"pip install 'mlm-cli[{extra}]'"


def _cpu() -> dict[str, Any]:
    import torch

    facts: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                facts.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    flags = facts.get("flags", "").split()
    return {
        "model": facts.get("model name") or platform.processor() or None,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "products": {kind: _product_type(kind) for kind in ("bfloat16", "float16")},
        "bf16": [flag for flag in ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16") if flag in flags],
        "memory_bytes": _memory(),
    }


def _product_type(kind: str) -> str:
    """What matrix products of this type are computed in."""
    import torch

    from mlm_cli.ops import products

    return kind if products.has_products(getattr(torch, kind)) else "float32"


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _devices() -> list[dict[str, Any]]:
    """The GPUs torch can use."""
    import torch

    found = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(number)
        capability = f"{facts.major}.{facts.minor}"
        found.append({"name": facts.name, "memory_bytes": facts.total_memory, "capability": capability})
    return found


def _distributed() -> dict[str, Any]:
    import torch

    if not torch.distributed.is_available():
        return {"gloo": False, "nccl": False, "mpi": False}
    return {
        "gloo": torch.distributed.is_gloo_available(),
        "nccl": torch.distributed.is_nccl_available(),
        "mpi": torch.distributed.is_mpi_available(),
        "cuda_of_torch": torch.version.cuda,
    }


def _kernels() -> list[dict[str, str]]:
    """Each operator, where it runs, and why (``ops.status``)."""
    from mlm_cli import ops

    return ops.status()


def as_text(report: dict[str, Any]) -> str:
    """The report as lines for people."""
    cpu = report["cpu"]
    lines = [
        f"mlm {report['mlm']}, Python {report['python']} ({sys.executable}), {report['platform']}",
        "",
        "packages   " + ", ".join(f"{name} {version or 'MISSING'}" for name, version in report["packages"].items()),
    ]
    for item in report["optional"]:
        state = item["version"] or f"not installed ({item['purpose']}): {item['install']}"
        lines.append(f"           {item['name']} {state}")
    memory = f"{cpu['memory_bytes'] / 2**30:.1f} GiB" if cpu["memory_bytes"] else "unknown memory"
    lines += [
        "",
        f"cpu        {cpu['model'] or 'unknown'}: {cpu['cores']} cores, {cpu['torch_threads']} torch threads, {memory}",
        f"           {cpu['capability']}; bf16 matrix instructions: {', '.join(cpu['bf16']) or 'none'}; "
        + ", ".join(f"{kind} products in {used}" for kind, used in cpu["products"].items()),
    ]
    if not report["devices"]:
        cuda = report["distributed"].get("cuda_of_torch")
        lines.append(
            "gpu        none" + (f" (torch is built for CUDA {cuda})" if cuda else " (torch is built for CPUs only)")
        )
    for number, device in enumerate(report["devices"]):
        size = f"{device['memory_bytes'] / 2**30:.0f} GiB"
        lines.append(f"gpu {number}      {device['name']}, {size}, compute capability {device['capability']}")
    backends = [name for name in ("gloo", "nccl", "mpi") if report["distributed"].get(name)]
    lines += [f"ranks      talk through {', '.join(backends) or 'nothing'}", ""]
    width = max((len(kernel["name"]) for kernel in report["kernels"]), default=0)
    for number, kernel in enumerate(report["kernels"]):
        head = "kernels" if number == 0 else ""
        lines.append(f"{head:<10} {kernel['name']:<{width}}  {kernel['backend']:<9}  {kernel['reason']}")
    lines += ["", "tools      " + ", ".join(f"{name} {path or '-'}" for name, path in report["tools"].items())]
    variables = " ".join(f"{name}={value}" for name, value in report["environment"].items())
    return "\n".join([*lines, f"variables  {variables or '-'}"])
