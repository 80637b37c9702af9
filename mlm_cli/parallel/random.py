"""Random numbers that do not depend on the layout where they must not, and differ where they must.

Initial weights are a function of (seed, full parameter name): drawn in full, then sliced. Dropout outside sliced
regions must be equal on all tensor ranks (they hold the same activations) and inside must differ: two streams.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.shard import full_shape, shard_of, slice_full


def key_of(*parts: object) -> int:
    """A 63-bit seed from any printable parts; equal on every machine and Python version."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def initial_weight(name: str, shape: tuple[int, ...], init: float | str, seed: int, valid: int | None = None) -> Tensor:
    """The full initial value of parameter ``name``, float32 on the CPU.

    ``init`` is a standard deviation, ``"zeros"`` or ``"ones"``. Rows from ``valid`` on are padding and zero: how far a
    vocabulary is padded does not change the draw.
    """
    if init == "zeros":
        return torch.zeros(shape)
    if init == "ones":
        return torch.ones(shape)
    generator = torch.Generator().manual_seed(key_of(seed, name))
    drawn_shape = shape if valid is None else (valid, *shape[1:])
    drawn = torch.empty(drawn_shape).normal_(0.0, float(init), generator=generator)
    padding = shape[0] - drawn_shape[0]
    return torch.cat([drawn, drawn.new_zeros(padding, *shape[1:])]) if padding else drawn


@torch.no_grad()
def initialize(module: nn.Module, parallel: ParallelContext, seed: int, prefix: str = "") -> None:
    """Fill every parameter that carries ``param.init``, each from its full name ``prefix + name``."""
    for name, param in module.named_parameters():
        shard = shard_of(param)
        shape = full_shape(param, parallel.tensor.size)
        full = initial_weight(prefix + name, shape, param.init, seed, shard.valid if shard else None)
        param.copy_(slice_full(full, shard, parallel.tensor.rank, parallel.tensor.size))


class RandomStreams:
    """Two streams of dropout masks: torch's default generator (outside sliced regions) and one for inside them.

    Args:
        seed: of the run. The default stream then depends on the rank among replicas (who see other tokens) and stages,
            the sliced one also on the tensor rank.
    """

    def __init__(self, parallel: ParallelContext, seed: int) -> None:
        place = (parallel.replicas.rank, parallel.pipeline.rank)
        self.device = parallel.device
        torch.manual_seed(key_of(seed, "default", *place))
        self._sliced = torch.Generator(device=self.device)
        self._sliced.manual_seed(key_of(seed, "sliced", *place, parallel.tensor.rank))

    @contextmanager
    def sliced(self) -> Iterator[None]:
        """Draw from the stream of this tensor rank: for dropout inside a sliced region."""
        default = self._default().get_state()
        self._default().set_state(self._sliced.get_state())
        try:
            yield
        finally:
            self._sliced.set_state(self._default().get_state())
            self._default().set_state(default)

    def _default(self) -> torch.Generator:
        if self.device.type == "cuda":
            return torch.cuda.default_generators[self.device.index or 0]
        return torch.default_generator

    def get_state(self) -> dict[str, Tensor]:
        """Both streams (and the CPU's, where the device is another) as byte tensors."""
        state = {"default": self._default().get_state(), "sliced": self._sliced.get_state()}
        return state | {"cpu": torch.get_rng_state()}

    def set_state(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        self._default().set_state(state["default"])
        self._sliced.set_state(state["sliced"])

    def recompute_contexts(self) -> tuple[Any, Any]:
        """For ``torch.utils.checkpoint(context_fn=...)``: recomputation sees the sliced stream as the forward did."""
        before: list[Tensor] = []

        @contextmanager
        def forward() -> Iterator[None]:
            before.append(self._sliced.get_state())
            yield

        @contextmanager
        def again() -> Iterator[None]:
            after = self._sliced.get_state()
            self._sliced.set_state(before[0])
            try:
                yield
            finally:
                self._sliced.set_state(after)

        return forward(), again()
