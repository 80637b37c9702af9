"""A model as something that is given tokens and answers with the logits of what comes next.

With tensor slicing, rank 0 of the group decides and the others follow: each call on rank 0 is announced to them, so
that sampling, stop strings, reading prompts and Ctrl-C happen in one place and ranks cannot disagree about them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mlm_cli import heartbeat
from mlm_cli.generation.slots import Slots
from mlm_cli.generation.step_plan import StepPlan
from mlm_cli.models.gpt import GPT
from mlm_cli.models.info import build_info
from mlm_cli.models.model import Model
from mlm_cli.parallel.layers import ParallelLinear

_END, _EXTEND, _STEP, _DROP, _ARRANGE, _REST = range(6)


class Decoder:
    """Cached decoding of up to ``num_slots`` texts at once.

    The rows in use are 0 .. ``used - 1``. Gradients are never recorded.

    Args:
        model: in eval mode. Matrices that it holds as int8 stay so where the fused step reads them; elsewhere they are
            turned into the floating point they stand for, here and once, as the layers would at every token.
        num_slots: texts at once.
        max_length: tokens a text may have; unset: the model's context.
        fused: use the fused decoding step where there is one for this model.
        keep_states: keep the last layer's states, which the fused step does not give.

    Attributes:
        states: with ``keep_states``, of the tokens of the last ``add`` or ``extend``, ``[s, h]``, or of the last
            ``step``, ``[b, h]``.
    """

    def __init__(
        self,
        model: GPT,
        num_slots: int = 1,
        max_length: int | None = None,
        *,
        fused: bool = True,
        keep_states: bool = False,
    ) -> None:
        self.model = model
        self.max_length = max_length or model.config.seq_length
        self._group = model.parallel.tensor
        self.num_slots = num_slots
        self._slots = Slots(model, num_slots, self.max_length)
        self._plan = StepPlan.of(model, self.max_length) if fused and not keep_states else None
        if self._plan is None:
            _hold_floats(model)
        self._keep_states = keep_states
        self.states = torch.empty(0)

    @property
    def used(self) -> int:
        return self._slots.used

    def length(self, row: int) -> int:
        """Tokens of a row that the model has seen."""
        return self._slots.lengths[row]

    # What rank 0 calls -------------------------------------------------------------------------------------------

    def prefix(self, prompt: Sequence[int]) -> Sequence[int]:
        """The tokens that an answer goes on from: of a causal model, the prompt itself."""
        return prompt

    def add(self, tokens: Sequence[int]) -> Tensor:
        """Begin a text in row ``used``. Returns the logits after its last token, [vocab_size]."""
        return self.extend(self.used, tokens)

    def extend(self, row: int, tokens: Sequence[int]) -> Tensor:
        """Append known tokens to a row (``used`` begins a new one). Returns the logits after the last, [vocab_size]."""
        assert tokens and row <= self.used and row < self.num_slots
        self._announce(_EXTEND, [row, len(tokens)])
        self._group.broadcast_(torch.tensor(tokens, device=self.model.parallel.device))
        return self._extend(row, tokens)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to every row in use. Returns the logits after them, [b, vocab_size]."""
        assert len(tokens) == self.used
        self._announce(_STEP, tokens)
        return self._step(tokens)

    def drop(self, row: int) -> None:
        """Forget a row; the last row in use takes its number."""
        self._announce(_DROP, [row])
        self._drop(row)

    def arrange(self, sources: Sequence[int]) -> None:
        """Row ``i`` becomes what row ``sources[i]`` was: texts fork, change places and leave."""
        assert len(sources) <= self.num_slots and all(0 <= source < self.used for source in sources)
        if list(sources) != list(range(self.used)):
            self._announce(_ARRANGE, sources)
            self._arrange(sources)

    def rest(self) -> None:
        """Nothing to do for now: said once in a while, so that those who follow do not take the silence for a loss."""
        self._announce(_REST, [])

    def close(self) -> None:
        """Let the following ranks go."""
        self._announce(_END, [])

    # What the other ranks do -------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Do what rank 0 of the tensor group announces, until it closes."""
        device = self.model.parallel.device
        while True:
            heartbeat.beat()
            message = torch.zeros(2 + max(2, self.num_slots), dtype=torch.int64, device=device)
            kind, count, *values = self._group.broadcast_(message).tolist()
            if kind == _END:
                return
            if kind == _REST:
                continue
            if kind == _STEP:
                self._step(values[:count])
            elif kind == _DROP:
                self._drop(values[0])
            elif kind == _ARRANGE:
                self._arrange(values[:count])
            else:
                row, length = values[:2]
                tokens = torch.zeros(length, dtype=torch.int64, device=device)
                self._extend(row, self._group.broadcast_(tokens).tolist())

    def _announce(self, kind: int, values: Sequence[int]) -> None:
        heartbeat.beat()
        if self._group.size > 1:
            padding = [0] * (max(2, self.num_slots) - len(values))
            message = [kind, len(values), *values, *padding]
            self._group.broadcast_(torch.tensor(message, device=self.model.parallel.device))

    # What every rank computes ------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _drop(self, row: int) -> None:
        self._slots.drop(row)

    @torch.inference_mode()
    def _arrange(self, sources: Sequence[int]) -> None:
        self._slots.arrange(sources)

    def _keep(self, states: Tensor) -> None:
        if self._keep_states:
            self.states = states

    @torch.inference_mode()
    def _extend(self, row: int, tokens: Sequence[int]) -> Tensor:
        slots, model = self._slots, self.model
        if row == slots.used:
            slots.begin_row()
        slots.reserve(slots.lengths[row] + len(tokens))
        cache = slots.row_cache(row)
        hidden = model.hidden(torch.tensor([tokens], device=model.parallel.device), cache=cache)
        slots.lengths[row] = cache.length
        self._keep(hidden[0])
        return model.gather_logits(model.logits(hidden[0, -1]))

    @torch.inference_mode()
    def _step(self, tokens: Sequence[int]) -> Tensor:
        slots, model = self._slots, self.model
        slots.begin_step()
        new = torch.tensor(tokens, device=model.parallel.device)
        if self._plan is not None and len(tokens) <= self._plan.most_rows:
            return self._plan.logits(new, slots)
        hidden = self._hidden(new[:, None])
        self._keep(hidden[:, 0])
        return model.gather_logits(model.logits(hidden))[:, 0]

    def _hidden(self, tokens: Tensor) -> Tensor:
        """The model's own layers over one token a row, [b, 1] -> [b, 1, h]."""
        slots, model = self._slots, self.model
        info = build_info(tokens, positions=slots.positions[:, None], table=model._rotary, dtype=model.dtype)
        info = replace(info, visible=slots.visible(), runs=None)
        x = model.embedding(tokens, info)
        for layer, cache in zip(model.layers, slots.layers, strict=True):
            x = layer(x, info, cache)
        return model.final_norm(x)


def _hold_floats(model: Model) -> None:
    for module in model.modules():
        if isinstance(module, ParallelLinear):
            module.hold_floats(model.dtype)
