"""What a training step achieves: tokens per second, model FLOP/s, their share of what the processor can do (MFU)."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

import torch

from mlm_cli.ops import products

# Dense matrix rates of the makers' data sheets, TFLOP/s: (bfloat16, float32 without TF32). Longest name that fits wins.
_GPU_PEAK = {
    "B200": (2250.0, 75.0),
    "H200": (989.4, 66.9),
    "H100": (989.4, 66.9),
    "H100 PCIe": (756.0, 51.2),
    "H100 NVL": (835.0, 60.0),
    "GH200": (989.4, 66.9),
    "A100": (312.0, 19.5),
    "A800": (312.0, 19.5),
    "A40": (149.7, 37.4),
    "A30": (165.0, 10.3),
    "A10": (125.0, 31.2),
    "L40S": (362.0, 91.6),
    "L40": (181.0, 90.5),
    "L4": (121.0, 30.3),
    "RTX 3090": (71.0, 35.6),
    "RTX 4090": (165.2, 82.6),
    "RTX 5090": (209.5, 104.8),
}
MFU_FORMULA = "model FLOP/s (Narayanan et al. 2021, eq. 3, without recomputation) / matrix rate of all ranks"


@dataclass(frozen=True)
class Peak:
    """The matrix rate that MFU is a share of: FLOP/s of this rank, and where the number is from."""

    flops: float | None
    source: str


def find_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """A GPU's rate from its data sheet; a CPU's is measured, because it depends on cores, clock and library."""
    if device.type == "cpu":
        wide = products.widens(torch.empty(0, dtype=dtype))
        label = str(torch.float32 if wide else dtype).removeprefix("torch.")
        return Peak(measure_matrix_rate(dtype), f"measured {label} matrix rate of {torch.get_num_threads()} threads")
    name = torch.cuda.get_device_name(device)
    fitting = [known for known in _GPU_PEAK if known in name]
    if not fitting:
        return Peak(None, f"unknown for {name}")
    best = max(fitting, key=len)
    return Peak(_GPU_PEAK[best][0 if dtype == torch.bfloat16 else 1] * 1e12, f"data sheet of {best}")


def measure_matrix_rate(dtype: torch.dtype, *, seconds: float = 0.2, size: int = 1024) -> float:
    """Best FLOP/s of a square matrix product on the CPU, within about ``seconds``. Draws no random numbers."""
    left = torch.full((size, size), 0.5, dtype=dtype)
    right = torch.full((size, size), 0.25, dtype=dtype)
    out = torch.empty_like(left)
    products.mm(left, right, out=out)  # the first call sets up threads and weights
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        begin = time.perf_counter()
        products.mm(left, right, out=out)
        now = time.perf_counter()
        best = min(best, now - begin)
        if now > end:
            return 2.0 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """Largest memory this rank has used, in bytes: of the GPU, or resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class Speed:
    """Sums over the steps since the last record. Evaluation and saving are not in them, nor is the first step."""

    steps: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    tokens: int = 0

    def add(self, seconds: float, data_seconds: float, tokens: int) -> None:
        self.steps += 1
        self.seconds += seconds
        self.data_seconds += data_seconds
        self.tokens += tokens

    def values(self, flops_per_token: float | None, peak_flops: float | None) -> dict[str, float | None]:
        """Per second and per step; None for what is unknown."""
        rate = self.tokens / self.seconds if self.steps and self.seconds > 0 else None
        flops = rate * flops_per_token if rate is not None and flops_per_token is not None else None
        return {
            "tokens_per_s": rate,
            "tflops": None if flops is None else flops / 1e12,
            "mfu": flops / peak_flops if flops is not None and peak_flops else None,
            "step_time": self.seconds / self.steps if self.steps else None,
            "data_time": self.data_seconds / self.steps if self.steps else None,
        }
