"""What benchmarks/ops.py measures: for every operator its work, its rivals' and the bytes that must move."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mlm_cli import ops

Work = Callable[[], object]


@dataclass
class Case:
    """One row of the table. ``rivals`` do the same work as ``ours``."""

    operator: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes_moved: float
    ours: Work
    rivals: dict[str, Work]
    target: dict[str, float] = field(default_factory=dict)  # rival -> wanted ratio; "roof" -> wanted share


def _both_passes(function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: list[Tensor]) -> Work:
    """Forward and backward with a given upstream gradient; results are dropped as a training loop drops them."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    sample = function(*leaves)
    grads = [torch.randn_like(t) for t in (sample if isinstance(sample, tuple) else (sample,))]
    del sample

    def work() -> object:
        results = function(*leaves)
        return torch.autograd.grad(results if isinstance(results, tuple) else [results], leaves, grads)

    return work


def _backward(function: Callable[..., Tensor], inputs: list[Tensor]) -> Work:
    """The backward pass alone, again and again over one forward pass."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    result = function(*leaves)
    grad = torch.randn_like(result)
    return lambda: torch.autograd.grad(result, leaves, grad, retain_graph=True)


def _forward(function: Callable[..., Tensor], inputs: list[Tensor]) -> Work:
    def work() -> object:
        with torch.no_grad():
            return function(*inputs)

    return work


class Maker:
    """Makes cases for one device, with or without ``torch.compile`` rivals."""

    def __init__(self, device: str, compiled: bool) -> None:
        self.device, self.compiled = device, compiled

    def one_pass(
        self, kind: str, width: int, dtype: torch.dtype, elements: int, *, backward: bool, compiled: bool
    ) -> Case:
        """A row operator forward or backward alone, over rows of one width: the table of a GPU."""
        rows = elements // width
        inputs = [self.randn(rows, width, dtype=dtype)]
        if kind.endswith("norm"):
            inputs += [self.randn(width, dtype=dtype) for _ in range(2 if kind == "layer_norm" else 1)]
        functions = {
            "layer_norm": (ops.layer_norm, lambda x, w, b: F.layer_norm(x, (width,), w, b)),
            "rms_norm": (ops.rms_norm, lambda x, w: F.rms_norm(x, (width,), w, 1e-5)),
            "softmax": (lambda x: ops.scaled_masked_softmax(x, None, 1.0), lambda x: torch.softmax(x, -1)),
        }
        ours, torchs = functions[kind]
        alone = _backward if backward else _forward
        rivals = {"torch": alone(torchs, inputs)}
        if self.compiled and compiled:
            torch._dynamo.reset()
            rivals["compile"] = alone(torch.compile(torchs, dynamic=False), inputs)
        if (liger := _liger(kind)) is not None:
            rivals["liger"] = alone(liger, inputs)
        moved = (3 if backward else 2) * inputs[0].numel() * dtype.itemsize
        target = {"torch": 1.0, "compile": 1.0, "liger": 1.0}
        target["roof"] = 0.75 if backward else 0.9 if width >= 4096 else 0.8 if width >= 1024 else 0.0
        name = f"{kind} bwd" if backward else f"{kind} fwd"
        return Case(name, (rows, width), dtype, moved, alone(ours, inputs), rivals, target)

    def randn(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, device=self.device).to(dtype)

    def rivals(
        self, chain: Callable[..., Tensor | tuple[Tensor, ...]], inputs: list[Tensor], name: str
    ) -> dict[str, Work]:
        found = {name: _both_passes(chain, inputs)}
        if self.compiled:
            torch._dynamo.reset()
            found["compile"] = _both_passes(torch.compile(chain, dynamic=False), inputs)
        return found

    def norm(self, kind: str, rows: int, hidden: int, dtype: torch.dtype, target: dict[str, float]) -> Case:
        x, weight, bias = (self.randn(*s, dtype=dtype) for s in ((rows, hidden), (hidden,), (hidden,)))
        if kind == "layer_norm":
            inputs = [x, weight, bias]
            ours, torchs = ops.layer_norm, lambda x, w, b: F.layer_norm(x, (hidden,), w, b)
        else:
            inputs = [x, weight]
            ours, torchs = ops.rms_norm, lambda x, w: F.rms_norm(x, (hidden,), w, 1e-5)
        rivals = {"torch": _both_passes(torchs, inputs)}
        moved = 5 * x.numel() * x.element_size()
        return Case(kind, (rows, hidden), dtype, moved, _both_passes(ours, inputs), rivals, target)

    def residual_norm(self, rows: int, hidden: int, dtype: torch.dtype, target: dict[str, float]) -> Case:
        x, residual = self.randn(rows, hidden, dtype=dtype), self.randn(rows, hidden, dtype=dtype)
        weight, norm_bias, bias = (self.randn(hidden, dtype=dtype) for _ in range(3))
        inputs = [x, residual, weight, norm_bias, bias]

        def separate(x: Tensor, residual: Tensor, w: Tensor, nb: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            total = x + b + residual
            return F.layer_norm(total, (hidden,), w, nb), total

        def ours(x: Tensor, residual: Tensor, w: Tensor, nb: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return ops.residual_norm(x, residual, w, nb, bias=b)

        moved = 8 * x.numel() * x.element_size()
        rivals = self.rivals(separate, inputs, "separate")
        return Case("residual_norm", (rows, hidden), dtype, moved, _both_passes(ours, inputs), rivals, target)

    def softmax(self, kind: str, shape: tuple[int, ...], dtype: torch.dtype, target: dict[str, float]) -> Case:
        scores, (queries, keys) = self.randn(*shape, dtype=dtype), shape[-2:]
        hidden = torch.ones(queries, keys, dtype=torch.bool, device=self.device).triu(1 + keys - queries)
        if kind == "masked_softmax":
            hidden = (torch.rand(shape[0], 1, queries, keys, device=self.device) < 0.2).to(self.device)

        def chain(x: Tensor) -> Tensor:
            return torch.softmax((x * 0.125).masked_fill(hidden, -math.inf), -1)

        def causal(x: Tensor) -> Tensor:
            return ops.scaled_causal_softmax(x, 0.125, offset=keys - queries)

        def masked(x: Tensor) -> Tensor:
            return ops.scaled_masked_softmax(x, hidden, 0.125)

        seen = 1.0 if kind == "masked_softmax" else 1.0 - hidden.float().mean().item()
        moved = (3 * seen + 2) * scores.numel() * scores.element_size()
        ours = _both_passes(masked if kind == "masked_softmax" else causal, [scores])
        return Case(kind, shape, dtype, moved, ours, self.rivals(chain, [scores], "eager"), target)

    def bias_gelu(self, rows: int, hidden: int, dtype: torch.dtype) -> Case:
        inputs = [self.randn(rows, hidden, dtype=dtype), self.randn(hidden, dtype=dtype)]
        rivals = self.rivals(lambda x, b: F.gelu(x + b, approximate="tanh"), inputs, "eager")
        moved = 5 * inputs[0].numel() * inputs[0].element_size()
        return Case(
            "bias_gelu", (rows, hidden), dtype, moved, _both_passes(ops.bias_gelu, inputs), rivals, {"eager": 1.0}
        )

    def swiglu(self, rows: int, hidden: int, dtype: torch.dtype) -> Case:
        x = self.randn(rows, 2 * hidden, dtype=dtype)

        def chain(x: Tensor) -> Tensor:
            gate, up = x.chunk(2, -1)
            return F.silu(gate) * up

        moved = 8 * rows * hidden * x.element_size()
        rivals = self.rivals(chain, [x], "eager")
        return Case("swiglu", (rows, hidden), dtype, moved, _both_passes(ops.swiglu, [x]), rivals, {"eager": 1.0})

    def cross_entropy(self, tokens: int, vocab: int, dtype: torch.dtype) -> Case:
        logits = self.randn(tokens, vocab, dtype=dtype)
        labels = torch.randint(0, vocab, (tokens,), device=self.device)
        buffer = logits.clone()
        scale = torch.full((tokens,), 1.0 / tokens, device=self.device)

        def ours() -> object:
            top, total, target = ops.cross_entropy_stats(buffer, labels, 0, vocab)
            lse = top + total.log()
            ops.cross_entropy_grad_(buffer, labels, lse, scale, 0, vocab)
            return (lse - target).mean()

        rivals = self.rivals(lambda x: F.cross_entropy(x.float(), labels), [logits], "eager")
        moved = 3 * logits.numel() * logits.element_size()
        return Case("cross_entropy", (tokens, vocab), dtype, moved, ours, rivals, {"eager": 1.0})

    def adamw(self, count: int, dtype: torch.dtype) -> Case:
        master, grad = self.randn(count, dtype=torch.float32), self.randn(count, dtype=dtype)
        moments = [torch.zeros_like(master), torch.zeros_like(master)]
        copy = master.to(dtype) if dtype != torch.float32 else None
        parameter = torch.nn.Parameter(master.clone())
        parameter.grad = grad.float()
        optimizer = torch.optim.AdamW([parameter], lr=1e-3, fused=True)

        def ours() -> object:
            return ops.adamw_(
                master, grad, *moments, copy,
                lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=5,
            )  # fmt: skip

        def fused() -> object:
            if copy is None:
                return optimizer.step()
            parameter.grad.copy_(grad)
            optimizer.step()
            return copy.copy_(parameter.data)

        moved = count * (24 + grad.element_size() + (0 if copy is None else copy.element_size()))
        return Case("adamw_", (count,), dtype, moved, ours, {"torch fused": fused}, {"torch fused": 1.0})


NORM_TARGET = {"torch": 1.2, "roof": 0.70}
SOFTMAX_TARGET = {"eager": 2.0, "compile": 1.1}
RESIDUAL_TARGET = {"separate": 1.5}


def cases(maker: Maker, *, big_bytes: int, small: bool, only: str = "") -> list[Callable[[], Case]]:
    """Thunks, so that only one case's tensors are alive. ``big_bytes``: size of one tensor of the big shapes."""
    made: list[tuple[str, Callable[[], Case]]] = []
    for dtype in (torch.float32, torch.bfloat16):
        made += _big_cases(maker, dtype, big_bytes)
        if small:
            made += _small_cases(maker, dtype)
    return [make for name, make in made if only in name]


def _liger(kind: str) -> Callable[..., Tensor] | None:
    """Liger-Kernel's Triton operator, where it is installed."""
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.softmax import LigerSoftmaxFunction
    except ImportError:
        return None
    return {
        "layer_norm": lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, 1e-5),
        # its backward pass writes into the upstream gradient unless told not to (in_place)
        "rms_norm": lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-5, 0.0, "llama", False),
        "softmax": LigerSoftmaxFunction.apply,
    }[kind]


WIDTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)


def gpu_cases(maker: Maker, *, big_bytes: int, only: str = "") -> list[Callable[[], Case]]:
    """Rows of every width in bfloat16, some in float32; then the other operators, forward and backward together."""
    made: list[tuple[str, Callable[[], Case]]] = []
    for kind in ("layer_norm", "rms_norm", "softmax"):
        for dtype, widths in ((torch.bfloat16, WIDTHS), (torch.float32, (1024, 4096, 16384))):
            for width in widths:
                for backward in (False, True):
                    # compiling takes seconds each: two kinds at three widths, the third at one
                    compared = (4096,) if kind == "rms_norm" else (1024, 4096, 16384)
                    compiled = dtype == torch.bfloat16 and width in compared
                    make = partial(
                        maker.one_pass,
                        kind,
                        width,
                        dtype,
                        big_bytes // dtype.itemsize,
                        backward=backward,
                        compiled=compiled,
                    )
                    made.append((kind, make))
    others = ("residual_norm", "masked_softmax", "causal_softmax", "bias_gelu", "swiglu", "cross_entropy", "adamw_")
    made += [(name, make) for name, make in _big_cases(maker, torch.bfloat16, big_bytes) if name in others]
    return [make for name, make in made if only in name]


def _big_cases(maker: Maker, dtype: torch.dtype, big_bytes: int) -> list[tuple[str, Callable[[], Case]]]:
    made: list[tuple[str, Callable[[], Case]]] = []
    elements = big_bytes // dtype.itemsize
    for hidden in (768, 2048, 8192):
        for kind in ("layer_norm", "rms_norm"):
            made.append((kind, partial(maker.norm, kind, elements // hidden, hidden, dtype, NORM_TARGET)))
    rows = elements // 2048
    made.append(("residual_norm", partial(maker.residual_norm, rows, 2048, dtype, RESIDUAL_TARGET)))
    shape = (4, max(1, elements // 4 // 1024 // 1024), 1024, 1024)
    for kind in ("masked_softmax", "causal_softmax"):
        made.append((kind, partial(maker.softmax, kind, shape, dtype, SOFTMAX_TARGET)))
    made.append(("bias_gelu", partial(maker.bias_gelu, rows, 2048, dtype)))
    made.append(("swiglu", partial(maker.swiglu, rows // 2, 2048, dtype)))
    made.append(("cross_entropy", partial(maker.cross_entropy, 512 if maker.device == "cpu" else 4096, 50304, dtype)))
    made.append(("adamw_", partial(maker.adamw, big_bytes // 8, dtype)))
    return made


def _small_cases(maker: Maker, dtype: torch.dtype) -> list[tuple[str, Callable[[], Case]]]:
    """A GPT of 6 layers x 384: what stays in the cache, and where a call's own cost shows."""
    made: list[tuple[str, Callable[[], Case]]] = []
    for rows in (1024, 2048):
        for kind in ("layer_norm", "rms_norm"):
            made.append((kind, partial(maker.norm, kind, rows, 384, dtype, {"torch": 1.0})))
        made.append(("residual_norm", partial(maker.residual_norm, rows, 384, dtype, {"separate": 1.0})))
        made.append(("bias_gelu", partial(maker.bias_gelu, rows, 1536, dtype)))
        made.append(("swiglu", partial(maker.swiglu, rows, 1024, dtype)))
    made.append(("adamw_", partial(maker.adamw, 384 * 1536, dtype)))
    return made
