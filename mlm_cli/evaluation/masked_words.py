"""How likely a masked language model finds a token at a place where it is hidden."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mlm_cli import heartbeat
from mlm_cli.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from mlm_cli.parallel.context import ParallelContext


class MaskedModel(Protocol):
    """What is needed of a masked language model (``models.bert.Bert``)."""

    parallel: ParallelContext

    def masked_losses(self, tokens: Tensor, places: Tensor, labels: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class HiddenToken:
    """A row of ids, special tokens included, whose ``place`` is to be ``label``; ``where`` it comes from."""

    ids: tuple[int, ...]
    place: int
    label: int
    where: str


def hidden_losses(
    model: MaskedModel,
    rows: Sequence[HiddenToken],
    *,
    mask: int,
    length: int,
    batch_size: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Loss of each row's label in nats, ``[rows]``. All ranks call; data ranks share the rows.

    Args:
        mask: id that is put where a token is hidden.
        length: tokens that the model reads at most.
        batch_size: rows that are read at once. They have one length: nothing is padded.

    Raises:
        DataError: a row too long for the model.
    """
    import torch

    for row in rows:
        if len(row.ids) > length:
            raise DataError(f"{row.where}: {len(row.ids)} tokens are more than the model reads ({length})")
    device, data = model.parallel.device, model.parallel.data
    losses = torch.zeros(len(rows), dtype=torch.float64)
    mine = sorted(range(data.rank, len(rows), data.size), key=lambda number: len(rows[number].ids))
    first = 0
    while first < len(mine):
        size = len(rows[mine[first]].ids)
        numbers = [number for number in mine[first : first + batch_size] if len(rows[number].ids) == size]
        first += len(numbers)
        batch = [rows[number] for number in numbers]
        tokens = torch.tensor([row.ids for row in batch], device=device)
        places = torch.tensor([row.place for row in batch], device=device)
        tokens[torch.arange(len(batch), device=device), places] = mask
        labels = torch.tensor([row.label for row in batch], device=device)
        losses[numbers] = model.masked_losses(tokens, places, labels).double().cpu()
        heartbeat.beat()
        if on_batch is not None:
            on_batch(first, len(mine))
    return data.all_reduce_(losses.to(device)).cpu().numpy()
