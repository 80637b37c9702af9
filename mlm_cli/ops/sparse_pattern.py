"""Which keys a query sees in sparse attention: the patterns, as a rule over pairs of tokens and as a mask of blocks.

Everything here is a pure function of the pattern and of positions. No two lengths of a sequence disagree about a pair
of tokens, so a pass over a part of a sequence (cached generation) sees what the whole pass sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

PATTERNS = ("local", "strided", "fixed", "longformer", "bigbird")


@dataclass(frozen=True)
class SparsePattern:
    """A pattern of sparse attention. Query ``i`` sees key ``j`` (positions in the sequence, from 0) where

    - ``local``: ``0 <= i - j < window`` if causal, else ``|i - j| <= window / 2`` (the sliding window of Beltagy et al.
      2020, "Longformer", section 3.1: half of it on each side).
    - ``longformer``: as ``local``, and the first ``global_tokens`` tokens are seen by all and, if not causal, see all
      (Beltagy et al. 2020, section 3.1, global attention).
    - ``bigbird``: as ``longformer``, and every block of ``block`` queries sees ``random`` whole blocks more, drawn from
      those that its window and the global tokens leave out (Zaheer et al. 2020, "Big Bird", section 2, and its blocked
      form in appendix D). All heads and layers share the draw.
    - ``strided``: as ``local``, and every ``window``-th block counted from its own: blocks ``I`` and ``J`` with
      ``(I - J) mod (window / block) = 0`` (Child et al. 2019, "Generating Long Sequences with Sparse Transformers",
      section 4.2, stride ``l = window``, a block taking the place of a token).
    - ``fixed``: the sequence is cut into stretches of ``window`` tokens; ``j`` is in the stretch of ``i``, or among the
      last ``global_tokens`` of any stretch (Child et al. 2019, section 4.3, ``l = window``, ``c = global_tokens``).

    A causal query never sees a later key. The cost of a query is bounded in ``local``, ``longformer`` and ``bigbird``;
    in ``strided`` and ``fixed`` it grows by ``block`` and ``global_tokens`` for every ``window`` tokens.

    Attributes:
        kind: one of ``PATTERNS``.
        block: tokens of a block.
        window: tokens.
        global_tokens: tokens.
        random: blocks.
        length: ``bigbird`` that is not causal draws from the blocks of so many tokens, however long the sequence is.
        seed: of the draw of ``bigbird``.
    """

    kind: str
    block: int = 64
    window: int = 512
    global_tokens: int = 64
    random: int = 3
    length: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in PATTERNS:
            raise ValueError(f"`{self.kind}` is not a sparse pattern; there are {', '.join(PATTERNS)}")
        if min(self.block, self.window) < 1 or min(self.global_tokens, self.random) < 0:
            raise ValueError("a pattern's block and window are at least 1, its global and random at least 0")
        if self.kind in ("strided", "fixed") and self.window % self.block:
            raise ValueError(f"`{self.kind}` needs a window of whole blocks; {self.window} is not of {self.block}")

    def visible(self, query: Tensor, key: Tensor, *, causal: bool, table: Tensor | None = None) -> Tensor:
        """Boolean, True where the query at one position sees the key at another; positions broadcast.

        Args:
            table: what ``random_table`` gives, large enough for these positions; unset: it is looked up.
        """
        if self.kind == "fixed":
            seen = (query // self.window == key // self.window) | (
                key % self.window >= self.window - self.global_tokens
            )
        else:
            distance = query - key
            seen = distance < self.window if causal else distance.abs() <= self.window // 2
            if self.kind == "strided":
                seen = seen | ((query // self.block - key // self.block) % (self.window // self.block) == 0)
        if self.kind in ("longformer", "bigbird") and self.global_tokens:
            seen = seen | (key < self.global_tokens)
            if not causal:
                seen = seen | (query < self.global_tokens)
        if self.kind == "bigbird" and self.random:
            if table is None:
                most = int(max(query.max(), key.max())) if query.numel() and key.numel() else 0
                table = random_table(self, most + 1, causal, query.device)
            seen = seen | table[query // self.block, key // self.block]
        return seen & (key <= query) if causal else seen

    def block_mask(self, num_queries: int, num_keys: int, *, causal: bool) -> np.ndarray:
        """Boolean ``[num_queries, num_keys]`` over blocks from position 0 on: True where any pair of tokens is seen."""
        first_query = np.arange(num_queries)[:, None] * self.block
        first_key = np.arange(num_keys)[None, :] * self.block
        last = self.block - 1
        if self.kind == "fixed":
            summary = (first_key + last) % self.window >= self.window - self.global_tokens
            seen = (first_query // self.window == first_key // self.window) | summary
        else:
            nearest = np.maximum(np.abs(first_query - first_key) - last, 0)
            seen = nearest < self.window if causal else nearest <= self.window // 2
            if self.kind == "strided":
                seen = seen | ((first_query - first_key) % self.window == 0)
        if self.kind in ("longformer", "bigbird"):
            seen = seen | (first_key < self.global_tokens)
            if not causal:
                seen = seen | (first_query < self.global_tokens)
        if self.kind == "bigbird" and self.random:
            seen = seen | random_blocks(self, max(num_queries, num_keys), causal)[:num_queries, :num_keys]
        return seen & (first_key <= first_query) if causal else np.broadcast_to(seen, (num_queries, num_keys))


@lru_cache(maxsize=16)
def random_blocks(pattern: SparsePattern, num_blocks: int, causal: bool) -> np.ndarray:
    """Boolean ``[num_blocks, num_blocks]``: random blocks of ``bigbird``; row I is the same for any number of blocks.

    Each pair of blocks has a pseudo-random rank (splitmix64); a row takes its lowest among the candidates.
    """
    block, drawn_from = pattern.block, -(-pattern.length // pattern.block)
    row, column = np.arange(num_blocks)[:, None], np.arange(num_blocks if causal else drawn_from)[None, :]
    nearest = (np.abs(row - column) - 1) * block + 1
    reach = pattern.window - 1 if causal else pattern.window // 2
    candidate = (nearest > reach) & (column * block >= pattern.global_tokens)
    if causal:
        candidate &= column < row
    pair = row.astype(np.uint64) << np.uint64(32) | column.astype(np.uint64)
    rank = _mix(_mix(np.array([[pattern.seed]], dtype=np.uint64)) ^ pair) >> np.uint64(1)
    rank = np.where(candidate, rank, np.uint64(2**64 - 1))
    table = np.zeros((num_blocks, max(num_blocks, column.size)), dtype=bool)
    count = min(pattern.random, column.size)
    lowest = np.argpartition(rank, count - 1, axis=1)[:, :count]
    np.put_along_axis(table, lowest, np.take_along_axis(candidate, lowest, 1), axis=1)
    return table[:, :num_blocks]


def random_table(pattern: SparsePattern, length: int, causal: bool, device: torch.device) -> Tensor:
    """``random_blocks`` for positions below ``length`` at least, as a tensor that is kept: the size is rounded up."""
    num_blocks = -(-length // pattern.block)
    return _kept_table(pattern, 1 << max(num_blocks - 1, 0).bit_length(), causal, device)


@lru_cache(maxsize=8)
def _kept_table(pattern: SparsePattern, num_blocks: int, causal: bool, device: torch.device) -> Tensor:
    return torch.from_numpy(random_blocks(pattern, num_blocks, causal)).to(device)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014): 64 bits in, 64 well-mixed bits out."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
