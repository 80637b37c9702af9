"""How likely a model finds a continuation of a context: what zero- and few-shot tasks are scored by.

Requests repeat themselves: the choices of a question share it, the questions of a task share the examples before them.
What several rows begin with is read once and kept as keys and values (prefix sharing; Juravsky et al. 2024,
"Hydragen"; Zheng et al. 2024, "SGLang", section 3), so that scores are those of reading each row by itself, up to
float rounding.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlm_cli import heartbeat
from mlm_cli.config.shapes import turns_by_length
from mlm_cli.data.special_tokens import Frame
from mlm_cli.data.tokenizer import Tokenizer
from mlm_cli.errors import DataError, NumericsError
from mlm_cli.evaluation.shared_prefix import Batch, Read, plan_rows
from mlm_cli.models.cache import KVCache
from mlm_cli.models.gpt import GPT

# Tokens that must be saved before a beginning gets a pass of its own: one pass costs what so many tokens do in a
# larger one (reading all weights on a CPU, starting the kernels on a GPU).
_WORTH_A_PASS = {"cpu": 32, "cuda": 512}
_LOGITS_BYTES = 64 << 20  # float32 logits over the whole vocabulary that exist at once


@dataclass(frozen=True)
class Row:
    """A context and its continuation as ids. ``begin >= 1`` is where the continuation begins; ``where`` it is from."""

    ids: tuple[int, ...]
    begin: int
    where: str = "a row"

    @property
    def num_scored(self) -> int:
        return len(self.ids) - self.begin

    def cut(self, length: int) -> Row:
        """The row without what a context of ``length`` tokens does not hold of its beginning."""
        extra = max(len(self.ids) - (length + 1), 0)
        return Row(self.ids[extra:], self.begin - extra, self.where)


@dataclass(frozen=True)
class Likelihood:
    """Of one continuation: log-probability in nats, and whether greedy decoding would have written it."""

    total: float
    greedy: bool


def encode_rows(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], where: Sequence[str]) -> list[Row]:
    """Rows of (context, continuation) texts, tokenised as lm-evaluation-harness does (``TemplateLM._encode_pair``).

    Both are encoded together and the context alone; what the whole has more is the continuation. Blanks at the end of a
    context belong to the continuation. A row begins as ``special_tokens.Frame`` has it; nothing before a continuation
    is the beginning of a document.

    Args:
        where: what errors call each pair.

    Raises:
        DataError: a continuation without tokens; no context, and no token that begins a document.
    """
    frame = Frame(tokenizer)
    moved = [_move_blanks(*pair) for pair in pairs]
    contexts = list(dict.fromkeys(context for context, _ in moved))
    begins = {
        context: frame.around(ids) for context, ids in zip(contexts, tokenizer.encode_batch(contexts), strict=True)
    }
    rows = []
    encoded = tokenizer.encode_batch([context + continuation for context, continuation in moved])
    for (context, continuation), ids, source in zip(moved, encoded, where, strict=True):
        begin = begins[context]
        if not begin:
            raise DataError(f"{source}: nothing stands before it, and the tokenizer has no token to begin with")
        # With no context the text is behind the token that begins it, unless it begins with that token itself.
        whole = frame.around(ids) if context or ids[:1] == begin else [*begin, *ids]
        row = Row(tuple(whole), len(begin), source)
        if row.num_scored < 1:
            raise DataError(f"{source}: the continuation {continuation!r} has no tokens of its own after its context")
        rows.append(row)
    return rows


def _move_blanks(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def score_rows(
    model: GPT,
    rows: Sequence[Row],
    *,
    length: int,
    batch_size: int,
    on_row: Callable[[int, int], None] | None = None,
) -> list[Likelihood]:
    """The likelihood of each row's continuation, equal on all ranks. All ranks call; data ranks share the rows.

    Contexts too long lose their beginning, as in lm-evaluation-harness.

    Args:
        model: in evaluation mode.
        length: tokens of context.
        batch_size: rows that are read at once on one rank.
        on_row: told (rows done, rows in all) of this rank.

    Raises:
        DataError: a continuation longer than the context; an id outside the vocabulary.
        NumericsError: logits that are not numbers.
    """
    for row in rows:
        if row.num_scored > length:
            raise DataError(
                f"{row.where}: a continuation of {row.num_scored} tokens is longer than the context ({length})",
                hint="leave it out, or score a model with a longer context",
            )
    largest = max((max(row.ids) for row in rows), default=0)
    if largest >= model.vocab_size:
        raise DataError(f"token id {largest} is not in the model's vocabulary of {model.vocab_size:,}")
    kept = [row.cut(length) for row in rows]
    data = model.parallel.data
    order = sorted(range(len(kept)), key=lambda number: kept[number].ids)
    share = -(-len(order) // data.size)
    mine = order[data.rank * share : (data.rank + 1) * share]  # neighbours share most
    found = torch.zeros(2, len(rows), dtype=torch.float64, device=model.parallel.device)
    scorer = _Scorer(model, length, batch_size)
    done = 0
    for numbers, scores in scorer.run([kept[number] for number in mine]):
        found[:, [mine[number] for number in numbers]] = scores
        done += len(numbers)
        heartbeat.beat()
        if on_row is not None:
            on_row(done, len(mine))
    totals, hits = data.all_reduce_(found).cpu().tolist()
    if not all(map(math.isfinite, totals)):
        raise NumericsError("the model's scores are not finite numbers", hint="check the checkpoint, or use fp32")
    return [Likelihood(total, hit == row.num_scored) for total, hit, row in zip(totals, hits, kept, strict=True)]


class _Scorer:
    """Reads the beginnings that rows share into one cache, and scores rows by what comes after."""

    def __init__(self, model: GPT, length: int, batch_size: int) -> None:
        self._model, self._length, self._batch_size = model, length, batch_size
        self._device = model.parallel.device
        self._path: KVCache | None = None  # one row: the beginning that the coming rows share
        self._own_length = turns_by_length(model.config)

    @torch.inference_mode()
    def run(self, rows: Sequence[Row]) -> Iterator[tuple[list[int], Tensor]]:
        """(numbers of some rows, their ``[2, rows]`` scores: log-probability, and how many tokens are the likeliest).

        ``rows`` are sorted by their ids.
        """
        limits = [row.begin - 1 for row in rows]  # the last token of a context is read with the continuation
        # Keys of such a model depend on how long the text is: nothing can be shared, and padding must not count.
        worth = sys.maxsize if self._own_length else _WORTH_A_PASS[self._device.type]
        for step in plan_rows([row.ids for row in rows], limits, batch_size=self._batch_size, worth=worth):
            if isinstance(step, Read):
                self._read(step)
            else:
                yield step.numbers, self._score([rows[number] for number in step.numbers], step)

    def _read(self, step: Read) -> None:
        if self._path is None:
            self._path = self._model.new_cache(1, self._length)
        self._path.truncate(step.depth)
        self._model.hidden(torch.tensor([step.ids], device=self._device), cache=self._path)

    def _score(self, rows: Sequence[Row], step: Batch) -> Tensor:
        depth = step.depth
        longest = max(len(row.ids) for row in rows) - 1 - depth
        tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
        for number, row in enumerate(rows):
            tokens[number, : len(row.ids) - 1 - depth] = torch.tensor(row.ids[depth:-1])
        cache = None
        if depth:
            assert self._path is not None
            self._path.truncate(depth)
            cache = self._path.spread(len(rows), longest)
        positions = None
        if self._own_length:
            lengths = torch.tensor([[len(row.ids) - 1] for row in rows])
            positions = torch.arange(longest).minimum(lengths - 1).to(self._device)
        hidden = self._model.hidden(tokens.to(self._device), positions=positions, cache=cache)
        owner = torch.cat([torch.full((row.num_scored,), number) for number, row in enumerate(rows)])
        place = torch.cat([torch.arange(row.begin - 1, len(row.ids) - 1) - depth for row in rows])
        labels = torch.tensor([token for row in rows for token in row.ids[row.begin :]], device=self._device)
        owner = owner.to(self._device)
        scores = torch.zeros(2, len(rows), dtype=torch.float64, device=self._device)
        picked = hidden[owner, place.to(self._device)]
        most = max(_LOGITS_BYTES // (4 * self._model.vocab_size), 1)
        for part in torch.arange(len(labels), device=self._device).split(most):
            logits = self._model.gather_logits(self._model.logits(picked[part])).float()
            chosen = logits.gather(-1, labels[part, None])[:, 0]
            scores[0].index_add_(0, owner[part], (chosen - logits.logsumexp(-1)).double())
            scores[1].index_add_(0, owner[part], (logits.argmax(-1) == labels[part]).double())
        return scores
