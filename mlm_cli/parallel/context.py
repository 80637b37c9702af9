"""Who works together: explicit groups of ranks, one object that says how the world is laid out.

A layer is given the ``Group`` it is sliced over and never asks for a rank. A group of size 1 makes every collective an
identity, so one code path serves one laptop core and many GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlm_cli.errors import UsageError

if TYPE_CHECKING:
    from mlm_cli.parallel.shared_memory import SharedMemory

_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


@dataclass(frozen=True)
class Group:
    """Some ranks that work together. ``rank`` counts inside the group; ``ranks`` are their numbers in the world."""

    rank: int = 0
    size: int = 1
    handle: Any = field(default=None, repr=False, compare=False)
    ranks: tuple[int, ...] = (0,)
    shared: SharedMemory | None = field(default=None, repr=False, compare=False)  # CPU ranks of one machine

    def all_reduce_(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Reduce ``tensor`` over the group, in place; returns it."""
        if self.size > 1:
            if op == "sum" and self.shared is not None and self.shared.takes(tensor):
                return self.shared.sum_(tensor)
            dist.all_reduce(tensor, op=_OPERATIONS[op], group=self.handle)
        return tensor

    def start_all_reduce_(self, tensor: Tensor) -> dist.Work | None:
        """Begin to sum ``tensor`` over the group in place; ``wait()`` on what comes back (None: it is done already)."""
        if self.size > 1 and (self.shared is None or not self.shared.takes(tensor)):
            return dist.all_reduce(tensor, group=self.handle, async_op=True)
        self.all_reduce_(tensor)
        return None

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks of the group, in rank order; all must have the same shape."""
        if self.size == 1:
            return [tensor]
        if self.shared is not None and self.shared.takes(tensor):
            return list(self.shared.gather_(tensor.new_empty((self.size, *tensor.shape)), tensor))
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.handle)
        return parts

    def start_all_gather(self, tensor: Tensor) -> tuple[list[Tensor], dist.Work | None]:
        """Begin ``all_gather``; the tensors are there after ``wait()`` on the second value (None: they are already)."""
        if self.size == 1 or (self.shared is not None and self.shared.takes(tensor)):
            return self.all_gather(tensor), None
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        return parts, dist.all_gather(parts, tensor.contiguous(), group=self.handle, async_op=True)

    def reduce_scatter(self, tensor: Tensor, dim: int) -> Tensor:
        """Sum ``tensor`` over the group and keep this rank's even part along ``dim``; ``tensor`` may be overwritten."""
        if self.size == 1:
            return tensor
        if self.shared is not None and self.shared.takes(tensor):
            return self.shared.sum_(tensor).chunk(self.size, dim)[self.rank].contiguous()
        parts = [part.contiguous() for part in tensor.chunk(self.size, dim)]
        own = torch.empty_like(parts[self.rank])
        dist.reduce_scatter(own, parts, group=self.handle)
        return own

    def all_to_all(self, tensor: Tensor) -> Tensor:
        """Part ``r`` of ``tensor`` along its first dimension goes to rank ``r``; theirs come back in rank order."""
        if self.size == 1:
            return tensor
        received = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, tensor.contiguous(), group=self.handle)
        return received

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Overwrite ``tensor`` with that of group rank ``source``; returns it."""
        if self.size > 1:
            dist.broadcast(tensor, src=self.ranks[source], group=self.handle)
        return tensor

    def to_first(self, tensors: dict[str, Tensor], source: int) -> dict[str, Tensor]:
        """Hand named tensors from group rank ``source`` to rank 0; all ranks call, the others get nothing."""
        if source == 0:
            return tensors if self.rank == 0 else {}
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(self.handle) == "nccl" else "cpu"
        if self.rank == source:
            about = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
            dist.send_object_list([about], dst=self.ranks[0], group=self.handle)
            for tensor in tensors.values():
                dist.send(tensor.to(device), self.ranks[0], group=self.handle)
            return {}
        if self.rank != 0:
            return {}
        heard: list[Any] = [None]
        dist.recv_object_list(heard, src=self.ranks[source], group=self.handle)
        received = {}
        for name, shape, dtype in heard[0]:
            buffer = torch.empty(shape, dtype=dtype, device=device)
            dist.recv(buffer, self.ranks[source], group=self.handle)
            received[name] = buffer.cpu()
        return received

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.handle)


SOLO = Group()


@dataclass(frozen=True)
class ParallelContext:
    """The groups of this rank: ``tensor`` slices of one layer, ``data`` copies of the model, ``pipeline`` stages of it.

    ``context`` shares out the tokens of each sample over copies of the model (``parallel.ulysses``); ``data`` ranks
    read different samples. Both together are the ``replicas``: they hold the same weights, average gradients and share
    out the optimizer state.

    ``sequence`` shares out the tokens between sliced layers: it is the tensor group, or this rank alone.

    Ranks are numbered with the tensor rank fastest, then context, data, and pipeline, as Megatron numbers them, and
    DeepSpeed's ``ProcessTopology`` (axes pipe, data, model) with replicas as its data axis.
    """

    world: Group = SOLO
    tensor: Group = SOLO
    data: Group = SOLO
    pipeline: Group = SOLO
    sequence: Group = SOLO
    context: Group = SOLO
    replicas: Group = SOLO
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @staticmethod
    def single(device: torch.device | str = "cpu") -> ParallelContext:
        """One rank that is the whole job."""
        return ParallelContext(device=torch.device(device))

    @staticmethod
    def create(
        *,
        tensor: int = 1,
        pipeline: int = 1,
        context: int = 1,
        sequence: bool = False,
        device: torch.device | str = "cpu",
    ) -> ParallelContext:
        """Lay out the world that ``distributed.init`` joined; data-parallel size is what is left.

        Every rank must call this, in the same order as any other group-making call.

        Raises:
            UsageError: the sizes do not divide the number of ranks.
        """
        joined = dist.is_available() and dist.is_initialized()
        size = dist.get_world_size() if joined else 1
        together = tensor * pipeline * context
        if size % together:
            more = f" x parallel.context={context}" if context > 1 else ""
            raise UsageError(
                f"{size} ranks cannot be laid out as parallel.tensor={tensor} x parallel.pipeline={pipeline}{more}",
                hint=f"use a multiple of {together} ranks, or smaller parallel sizes",
            )
        if not joined:
            return ParallelContext.single(device)
        # The grid of ranks, [pipeline, data, context, tensor]: a group is a line along one axis, or along two.
        grid = torch.arange(size).view(pipeline, -1, context, tensor)
        on_cpu = torch.device(device).type == "cpu"
        tensor_group = _make_groups(grid, shared=on_cpu)
        alone = context == 1  # then the replicas are the data ranks, and no more groups are made
        data_group = _make_groups(grid.permute(0, 2, 3, 1), shared=on_cpu and alone)
        replicas = data_group if alone else _make_groups(grid.permute(0, 3, 1, 2).flatten(2), shared=on_cpu)
        return ParallelContext(
            world=Group(dist.get_rank(), size, dist.group.WORLD, tuple(range(size))),
            tensor=tensor_group,
            data=data_group,
            pipeline=_make_groups(grid.permute(1, 2, 3, 0)),
            sequence=tensor_group if sequence else SOLO,
            context=SOLO if alone else _make_groups(grid.permute(0, 1, 3, 2)),
            replicas=replicas,
            device=torch.device(device),
        )


def _make_groups(grid: Tensor, *, shared: bool = False) -> Group:
    """Make a process group of every line along the last axis of ``grid``; returns the one this rank is in.

    ``shared``: let it sum through shared memory where all of its ranks are on one machine.

    Groups of one rank get a handle too: DeepSpeed reads a missing handle as "the whole world".
    """
    me, mine = dist.get_rank(), None
    for line in grid.reshape(-1, grid.shape[-1]).tolist():
        handle = dist.new_group(line)
        if me in line:
            mine = Group(line.index(me), len(line), handle, tuple(line))
    assert mine is not None
    if shared and mine.size > 1:
        from mlm_cli.parallel.shared_memory import open_shared_memory

        return replace(mine, shared=open_shared_memory(mine.rank, mine.size, mine.handle))
    return mine
