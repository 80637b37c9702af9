"""DeepSpeed's collectives over CPU ranks of one machine, through the memory that they share instead of sockets.

DeepSpeed sends every collective to one object, ``deepspeed.comm.comm.cdb``. Ours stands in front of it and takes the
two that ZeRO is made of, for one group: sums of gradients and gathers of weights. Gradients are not packed for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mlm_cli.parallel.context import Group


class SharedCollectives:
    """``backend``, but for what ``group`` does through shared memory."""

    def __init__(self, backend: Any, group: Group) -> None:
        assert group.shared is not None
        from deepspeed.comm import ReduceOp

        self._backend, self._handle, self._shared, self._sum = backend, group.handle, group.shared, ReduceOp.SUM

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def all_reduce(self, tensor: Tensor, op: Any = None, group: Any = None, async_op: bool = False) -> Any:
        op = self._sum if op is None else op
        if group is self._handle and op == self._sum and not async_op and self._shared.takes(tensor):
            self._shared.sum_(tensor)
            return None
        return self._backend.all_reduce(tensor, op, group, async_op)

    def all_gather_into_tensor(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        takes = self._shared.takes(input_tensor) and self._shared.takes(output_tensor)
        if group is self._handle and not async_op and takes:
            self._shared.gather_(output_tensor, input_tensor)
            return None
        return self._backend.all_gather_into_tensor(
            output_tensor=output_tensor, input_tensor=input_tensor, group=group, async_op=async_op
        )


def install(group: Group, engine: Any) -> None:
    """From now on DeepSpeed's sums and gathers over ``group`` go through its shared memory, where it has any.

    Args:
        engine: DeepSpeed's. Its gradients, and those of its optimizer, are then averaged where they lie.
    """
    import deepspeed.comm.comm as comm

    backend = comm.cdb._backend if isinstance(comm.cdb, SharedCollectives) else comm.cdb
    comm.cdb = SharedCollectives(backend, group) if group.shared is not None else backend
    if group.shared is not None:
        for owner in (engine, engine.optimizer):
            if hasattr(owner, "allreduce_and_copy"):
                owner.allreduce_and_copy = _averaged_in_place(owner.allreduce_and_copy, group)


def _averaged_in_place(original: Callable[..., None], group: Group) -> Callable[..., None]:
    """For ``allreduce_and_copy`` of DeepSpeed's engine and of its ZeRO optimizer, which average a bucket of gradients.

    They copy it into one tensor, sum that and copy back: worth it where each message costs, and here three passes over
    memory too many.
    """
    shared = group.shared
    assert shared is not None

    def average(bucket: Sequence[Tensor], *args: Any, **more: Any) -> None:
        fitting = all(grad.dtype == torch.float32 and shared.takes(grad) for grad in bucket)
        if not (fitting and _is_usual(args, more, group)):
            original(bucket, *args, **more)
            return
        for grad in bucket:
            shared.sum_(grad.div_(group.size))

    return average


def _is_usual(args: tuple[Any, ...], more: dict[str, Any], group: Group) -> bool:
    """Is an average over ``group`` asked for, on all its ranks, and nothing besides?"""
    # The engine gives the group and its size, the optimizer the type that is sent.
    if args not in ((group.handle, group.size), (torch.float32,)):
        return False
    usual = {"rank": None, "divide": True, "process_group": None, "log": None}
    asked = {key: value for key, value in more.items() if key != "output_bucket"}
    return {**usual, **asked} == usual and all(output is None for output in more.get("output_bucket") or ())
