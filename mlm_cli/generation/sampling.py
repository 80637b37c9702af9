"""Choosing the next token: greedy, temperature, top-k, top-p, repetition penalty, watermark.

The order is that of the field (and of `transformers`): penalty, temperature, top-k, top-p, watermark (which brings back
nothing that was cut, and whose bias no temperature divides). Random numbers are a pure function of (seed, prompt
number, token number), so an answer depends neither on the batch it was made in nor on the number of ranks, and a run
can be repeated on another machine.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlm_cli.errors import UsageError
from mlm_cli.generation.watermark import Watermark

# Nucleus sampling rarely needs more candidates than this; sorting a whole vocabulary of 50,304 costs some 3 ms.
_NUCLEUS_GUESS = 512


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token (greedy).
        top_k: keep the k likeliest tokens (Fan et al. 2018); 0 keeps all. Tokens that tie with the k-th stay.
        top_p: keep the fewest likeliest tokens whose mass reaches p (Holtzman et al. 2020); 1 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens already in the prompt or the
            answer (CTRL, Keskar et al. 2019, section 4.1); 1 is none.
        seed: of the random numbers.
        watermark: marks the text; None: does not.

    Raises:
        UsageError: a value out of range, or a watermark where there is nothing to choose.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 1234
    watermark: Watermark | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and (self.temperature >= 1e-6 or self.temperature == 0)):
            raise UsageError(f"temperature {self.temperature} is neither 0 nor 1e-6 or more", hint="0 is greedy")
        if self.top_k < 0:
            raise UsageError(f"top-k {self.top_k} is negative", hint="0 keeps every token")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p {self.top_p} is not in (0, 1]", hint="1 keeps every token")
        if not 1e-3 <= self.repetition_penalty <= 1e3:
            raise UsageError(
                f"repetition penalty {self.repetition_penalty} is not between 0.001 and 1000", hint="1 is no penalty"
            )
        if self.watermark is not None and self.top_k == 1:
            raise UsageError(
                "top-k 1 leaves a watermark nothing to choose from", hint="leave it out: `--temperature 0` is greedy"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def uniform(seed: int, prompt_number: int, token_number: int) -> float:
    """A number in [0, 1) that depends on its three arguments alone (53 random bits of BLAKE2b)."""
    digest = hashlib.blake2b(struct.pack("<QQQ", seed % 2**64, prompt_number, token_number), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens already seen less likely.

    Args:
        logits: [v], changed in place.
        seen: token ids, in any order, repeats allowed.
        penalty: above 0.

    Returns:
        ``logits``.
    """
    scores = logits[seen]
    logits[seen] = torch.where(scores < 0, scores * penalty, scores / penalty)
    return logits


def cut_top_k(logits: Tensor, k: int) -> Tensor:
    """Hide all but the k largest logits of each row. logits: [..., v]. Returns a new tensor with -inf where hidden."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    smallest_kept = torch.topk(logits, k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def cut_top_p(logits: Tensor, p: float) -> Tensor:
    """Hide what lies outside the nucleus: a token stays if the tokens likelier than it hold less than p of the mass.

    logits: [b, v]. Returns a new tensor with -inf where hidden. The likeliest token always stays, and so do tokens that
    tie with the last one kept, which makes the outcome independent of how the sort treats ties.
    """
    if p >= 1:
        return logits
    total = torch.logsumexp(logits, dim=-1, keepdim=True)
    vocabulary = logits.shape[-1]
    for count in (min(_NUCLEUS_GUESS, vocabulary), vocabulary):
        ranked = torch.topk(logits, count, dim=-1).values
        mass = torch.exp(ranked - total)
        above = mass.cumsum(dim=-1) - mass
        if count == vocabulary or bool((above[:, -1] >= p).all()):
            break
    last = (above < p).sum(dim=-1, keepdim=True) - 1
    return logits.masked_fill(logits < ranked.gather(-1, last.clamp_min(0)), -torch.inf)


def draw(logits: Tensor, numbers: Sequence[float]) -> Tensor:
    """Pick one token a row by inverting the cumulative distribution at the row's random number.

    Args:
        logits: [b, v]; -inf never comes out.
        numbers: b numbers in [0, 1).

    Returns:
        [b] int64.
    """
    cumulative = torch.softmax(logits, dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target = torch.tensor(numbers, dtype=torch.float64, device=logits.device)[:, None] * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, target, right=True)
    # Rounding can make the target equal the total: then the last token with any mass is meant.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous(), right=False)
    return torch.minimum(picked, last)[:, 0]


def choose(
    logits: Tensor,
    sampling: Sampling,
    seen: Sequence[Tensor] | None = None,
    numbers: Sequence[float] | None = None,
    contexts: Sequence[Sequence[int]] | None = None,
) -> list[int]:
    """The next token of each row, -1 where its logits are not numbers; the one place a step waits for the device.

    Args:
        logits: [b, v], of the true vocabulary only.
        sampling: how to choose.
        seen: per row the ids of prompt and answer so far; needed with a repetition penalty.
        numbers: per row a number in [0, 1); needed unless greedy.
        contexts: per row the last ids of prompt and answer so far; needed with a watermark.
    """
    logits = logits.float()
    largest = logits.amax(dim=-1, keepdim=True)  # NaN where any of the row is
    if sampling.repetition_penalty != 1:
        assert seen is not None
        logits = logits.clone()
        for row, ids in zip(logits, seen, strict=True):
            penalise_repetition(row, ids, sampling.repetition_penalty)
    if not sampling.greedy:
        below = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature  # however small that is
        logits = cut_top_p(cut_top_k(below, sampling.top_k), sampling.top_p)
    if sampling.watermark is not None:
        assert contexts is not None
        logits = sampling.watermark.mark(logits.clone(), contexts)
    if sampling.greedy:
        picked = logits.argmax(dim=-1)
    else:
        assert numbers is not None
        picked = draw(logits, numbers)
    return torch.where(torch.isfinite(largest[:, 0]), picked, -1).tolist()
