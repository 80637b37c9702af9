"""What every layer of one forward pass shares: positions, rotary tables and what each token may attend to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlm_cli import ops

if TYPE_CHECKING:
    from mlm_cli.models.cache import KVCache
    from mlm_cli.models.rotary import RotaryTable


@dataclass(frozen=True)
class SequenceInfo:
    """Worked out once a forward pass and handed to every layer.

    Attributes:
        positions: ``[b, s]`` or ``[s]``, the position of each token in its document.
        rotary: cosines and sines of these positions, ``[..., s, 1, d]`` each; None for learned positions.
        visible: boolean ``[b or 1, 1, s or 1, keys]``, True where a token may look; None means causal from the first
            key on, or every key where not ``causal``.
        offset: keys in the cache before the first of these tokens.
        causal: no token sees a later one (``visible`` has that in it already).
        segments: ``[b, s]`` document numbers that ``visible`` does not hold: sparse attention masks them itself.
        start: ``[b]`` padding at the left of each row of the cache.
        token_types: ``[b, s]``, which sentence a token is of, for models that have an embedding of it.
        bias: float ``[b or 1, n, s, keys]``, added to the scores of each head; -inf where a token may not look, so that
            it stands for ``visible`` and ``causal`` too. May need a gradient.
        runs: ``[1 or b, s]`` each, first key that a token sees and one after the last, where float32 attention on the
            CPU gains from knowing them. They say what ``visible``, ``causal`` and ``segments`` do, and go where those
            change.
    """

    positions: Tensor
    rotary: tuple[Tensor, Tensor] | None = None
    visible: Tensor | None = None
    offset: int = 0
    causal: bool = True
    segments: Tensor | None = None
    start: Tensor | None = None
    token_types: Tensor | None = None
    bias: Tensor | None = None
    runs: tuple[Tensor, Tensor] | None = None


def build_info(
    tokens: Tensor,
    *,
    positions: Tensor | None = None,
    segments: Tensor | None = None,
    cache: KVCache | None = None,
    table: RotaryTable | None = None,
    dtype: torch.dtype = torch.float32,
    sparse: bool = False,
) -> SequenceInfo:
    """Shared facts of a pass over ``tokens [b, s]``.

    Args:
        positions: ``[b, s]``; unset counts from 0, or from each row's start in the cache.
        segments: ``[b, s]`` document numbers; a token sees only its own document.
        cache: keys and values of earlier tokens.
        table: rotary tables where the model is rotary.
        dtype: of the activations.
        sparse: leave ``segments`` to attention, whose memory is then linear; no mask of all pairs is made.
    """
    length, device = tokens.shape[1], tokens.device
    offset = cache.length if cache is not None else 0
    visible: Tensor | None = None
    if positions is None:
        positions = torch.arange(offset, offset + length, device=device)
        if cache is not None and cache.start is not None:
            positions = (positions - cache.start[:, None]).clamp_(min=0)
    if segments is not None and not sparse:
        visible = document_mask(segments)
    elif cache is not None and (cache.start is not None or (offset and length > 1)):
        visible = cache_mask(length, offset, cache.start, device)
    rotary = table.at(positions, dtype) if table is not None else None
    start = cache.start if cache is not None else None
    runs = None
    if not sparse and start is None and _knows_runs(tokens, dtype):
        runs = ops.runs_of_keys(length, offset + length, causal=True, offset=offset, segments=segments)
    segments = segments if sparse else None
    return SequenceInfo(positions, rotary, visible, offset, segments=segments, start=start, runs=runs)


def _knows_runs(tokens: Tensor, dtype: torch.dtype) -> bool:
    """Would attention use them? Not in a step of decoding, which must not pay for them."""
    return tokens.is_cpu and dtype == torch.float32 and tokens.shape[1] >= ops.FEWEST_QUERIES


def document_mask(segments: Tensor) -> Tensor:
    """``[b, 1, s, s]``: causal, and within one document of ``segments [b, s]``."""
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same.tril_()


def cache_mask(length: int, offset: int, start: Tensor | None, device: torch.device) -> Tensor:
    """``[b or 1, 1, length, offset + length]``: causal after ``offset`` cached keys, the first ``start [b]`` hidden.

    A padding token sees itself, so that no row of the softmax is empty; nobody sees it.
    """
    query = torch.arange(offset, offset + length, device=device)[:, None]
    key = torch.arange(offset + length, device=device)[None, :]
    visible = (key <= query)[None, None]
    if start is None:
        return visible
    return (visible & (key >= start[:, None, None, None])) | (key == query)


def encoder_info(
    tokens: Tensor,
    *,
    lengths: Tensor | None = None,
    token_types: Tensor | None = None,
    table: RotaryTable | None = None,
    dtype: torch.dtype = torch.float32,
) -> SequenceInfo:
    """Shared facts of a pass over ``tokens [b, s]`` in which every token sees every other one.

    Args:
        lengths: ``[b]`` real tokens of each row, padded on the right; padding is seen by nobody. None: all full.
        token_types: ``[b, s]``.
    """
    length, device = tokens.shape[1], tokens.device
    positions = torch.arange(length, device=device)
    visible: Tensor | None = None
    # Asking whether any row is short costs nothing on the CPU, and full rows take the faster path; a GPU would wait.
    if lengths is not None and not (lengths.is_cpu and int(lengths.min()) == length):
        visible = (positions < lengths[:, None])[:, None, None]
    rotary = table.at(positions, dtype) if table is not None else None
    runs = ops.runs_of_keys(length, length, causal=False, visible=visible) if _knows_runs(tokens, dtype) else None
    return SequenceInfo(positions, rotary, visible, causal=False, token_types=token_types, runs=runs)


def cross_info(keys: SequenceInfo, num_queries: int) -> SequenceInfo:
    """``encoder_info`` of the keys that each of ``num_queries`` other tokens sees."""
    if keys.runs is None:
        return keys
    begin, end = (x[:, :1].expand(-1, num_queries) for x in keys.runs)  # the same for every query
    return replace(keys, runs=(begin, end))
