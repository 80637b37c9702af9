"""A watermark: a little more of some tokens than chance would have, which can be counted by who has the key.

Kirchenbauer et al. 2023, A Watermark for Large Language Models: what stands before a token seeds a choice of "green"
tokens (a share ``ratio`` of the vocabulary), and ``bias`` is added to their scores (algorithm 2). Of the ways to seed
(their 2024 paper On the Reliability of Watermarks, section 4) the two that transformers has are here, with the same
lists for the same key on a CPU, so that each detects what the other wrote:

- ``lefthash``: the last token alone;
- ``selfhash`` (algorithm 3): the last tokens and the one in question, by the smallest of the products of their hashes,
  so that a changed token spoils fewer lists, and who sees the text learns less about them. A list must be drawn for
  each of the likeliest tokens, which takes its time.

Lists are drawn on the CPU wherever the model is, for a generator of a GPU draws others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from mlm_cli.config.requests import WatermarkScheme

_TABLE_SIZE = 1_000_003  # hashes of tokens, modulo this
_CANDIDATES = 40  # likeliest tokens that selfhash looks at
_LISTS_BYTES = 64 << 20  # of memory for lists that were drawn before
USUAL_CONTEXT = {"lefthash": 1, "selfhash": 4}


@dataclass(frozen=True)
class Watermark:
    """How a text is marked.

    Attributes:
        key: from 1 to 2^63 - 1, to be kept secret. It is in no ``repr``.
        bias: added to the scores of green tokens (delta); of no concern to who looks for the mark.
        ratio: share of the vocabulary that is green (gamma), between 0 and 1.
        scheme: ``lefthash`` or ``selfhash``.
        context: tokens that seed a list; with ``selfhash`` the chosen one is among them. ``lefthash`` has 1.
    """

    key: int = field(repr=False)
    bias: float = 0.0
    ratio: float = 0.25
    scheme: WatermarkScheme = "lefthash"
    context: int = 1

    def __post_init__(self) -> None:
        assert 0 < self.key < 2**63 and 0 < self.ratio < 1 and self.context >= 1
        assert self.scheme == "selfhash" or self.context == 1

    @property
    def ngram(self) -> int:
        """Tokens that decide whether the last of them is green."""
        return self.context if self.scheme == "selfhash" else 2

    def mark(self, scores: Tensor, contexts: Sequence[Sequence[int]]) -> Tensor:
        """Add ``bias`` to the green tokens of each row.

        Args:
            scores: ``[b, v]`` float32, changed in place; what is -inf stays so. ``v`` is the true vocabulary.
            contexts: per row the ids of prompt and answer so far, at least the last ``context`` of them. A row with
                fewer is left as it is.

        Returns:
            ``scores``.
        """
        lists = green_lists(self, scores.shape[-1])
        for row, context in zip(scores, contexts, strict=True):
            if len(context) < self.context:
                continue
            if self.scheme == "lefthash":
                row.add_(lists.after(context[-1]).to(row.device), alpha=self.bias)
                continue
            values, candidates = row.topk(min(_CANDIDATES, len(row)))
            likely = candidates[values > -torch.inf].tolist()
            before = context[len(context) - self.context + 1 :]
            green = [token for token in likely if lists.is_green([*before, token])]
            row[torch.tensor(green, dtype=torch.int64, device=row.device)] += self.bias
        return scores


class GreenLists:
    """The green tokens of a vocabulary, as transformers' ``WatermarkLogitsProcessor`` draws them on a CPU.

    Args:
        vocab_size: without padded rows.
    """

    def __init__(self, watermark: Watermark, vocab_size: int) -> None:
        self._watermark, self._vocab_size = watermark, vocab_size
        self._num_green = int(vocab_size * watermark.ratio)
        self._random = torch.Generator()
        self._hashes = torch.empty(0, dtype=torch.int64)
        if watermark.scheme == "selfhash":
            self._hashes = torch.randperm(_TABLE_SIZE, generator=self._random.manual_seed(watermark.key))
        self._masks = lru_cache(max(1, _LISTS_BYTES // vocab_size))(self._mask)

    def after(self, token: int) -> Tensor:
        """``lefthash``: which tokens are green behind ``token``, ``[v]`` bool."""
        return self._masks(self._watermark.key * token % (2**64 - 1))

    def is_green(self, ngram: Sequence[int]) -> bool:
        """Is the last of ``ngram`` tokens green behind the others? See ``Watermark.ngram``."""
        if self._watermark.scheme == "lefthash":
            return bool(self.after(ngram[-2])[ngram[-1]])
        hashes = self._hashes[torch.tensor(ngram) % _TABLE_SIZE] + 1
        seed = int((self._watermark.key * hashes * hashes[-1]).min())  # in 64 bits, where it may wrap round
        return bool((self._draw(seed % (2**64 - 1)) == ngram[-1]).any())

    def _draw(self, seed: int) -> Tensor:
        """Ids of the green tokens."""
        order = torch.randperm(self._vocab_size, generator=self._random.manual_seed(seed))
        return order[: self._num_green]

    def _mask(self, seed: int) -> Tensor:
        return torch.zeros(self._vocab_size, dtype=torch.bool).index_fill_(0, self._draw(seed), True)


@lru_cache(4)
def green_lists(watermark: Watermark, vocab_size: int) -> GreenLists:
    """Kept, for a list that was drawn once is soon needed again."""
    return GreenLists(watermark, vocab_size)
