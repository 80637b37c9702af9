"""The ``mpu`` object that DeepSpeed asks for groups, ranks and sizes, answered from a ``ParallelContext``."""

from __future__ import annotations

from typing import Any

from mlm_cli.parallel.context import Group, ParallelContext

_AXES = {
    "model_parallel": "tensor",
    "tensor_model_parallel": "tensor",
    "slice_parallel": "tensor",
    "data_parallel": "replicas",
    "pipeline_model_parallel": "pipeline",
    "pipe_parallel": "pipeline",
}


class Mpu:
    """``get_{model,tensor_model,slice,data,pipeline_model,pipe}_parallel_{rank,world_size,group,src_rank}()``.

    Names that newer DeepSpeed code probes for (sequence, expert) are absent on purpose: absent means "not in use".
    """

    def __init__(self, parallel: ParallelContext) -> None:
        for name, axis in _AXES.items():
            group: Group = getattr(parallel, axis)
            self._answer(f"get_{name}_rank", group.rank)
            self._answer(f"get_{name}_world_size", group.size)
            self._answer(f"get_{name}_group", group.handle)
            self._answer(f"get_{name}_src_rank", group.ranks[0])

    def _answer(self, name: str, value: Any) -> None:
        setattr(self, name, lambda *args, **kwargs: value)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"this layout has no {name}")
