"""A mixture of experts in place of a feed-forward layer: each token goes to the one or two experts its router picks.

Routing is that of DeepSpeed's ``MoE`` layer (``deepspeed/moe/sharded_moe.py``: ``top1gating``, ``top2gating``; Fedus et
al. 2021, Lepikhin et al. 2021), held equal to it in the tests; tokens are moved by index, where a product with one-hot
masks would cost as much as the experts do. Experts are cut over the tensor ranks: these hold the same tokens, so each
computes its own experts' share and the sum over the ranks is the result, as in any row-sliced layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlm_cli import ops
from mlm_cli.config.initial_std import initial_std
from mlm_cli.config.schema import ExpertsSection, ModelSection
from mlm_cli.config.shapes import ffn_hidden_size, is_gated
from mlm_cli.models.extra_loss import ExtraLoss
from mlm_cli.ops import products
from mlm_cli.parallel.context import Group, ParallelContext
from mlm_cli.parallel.layers import new_parameter
from mlm_cli.parallel.mappings import copy_to_group, reduce_from_group
from mlm_cli.parallel.sequence import gather_tokens, reduce_scatter_tokens
from mlm_cli.parallel.shard import Shard

_LEAST_CAPACITY = 4  # tokens an expert takes at least, as in DeepSpeed


@dataclass(frozen=True)
class Routes:
    """Where ``t`` tokens go, ``k`` experts each.

    Attributes:
        experts: ``[k, t]`` number of the expert.
        places: ``[k, t]`` place among the tokens of that expert.
        gates: ``[k, t]`` float32 weight of the expert's answer, with gradient; 0 where the expert was full.
        capacity: places an expert has.
        balance: Fedus et al. 2021, equation 4: ``e * sum(share of first choices * mean probability)``; 1 when even.
        counts: ``[e]`` tokens that wanted each expert.
    """

    experts: Tensor
    places: Tensor
    gates: Tensor
    capacity: int
    balance: Tensor
    counts: Tensor


def route(logits: Tensor, *, top_k: int, capacity_factor: float | None) -> Routes:
    """Route tokens by ``logits [t, e]`` (float32). Early tokens come first where an expert has too few places.

    Args:
        top_k: 1: the gate is the expert's probability; 2: the two probabilities, scaled to sum to one.
        capacity_factor: places of an expert, as a multiple of an even share; None: as many as are wanted.
    """
    num_tokens, num_experts = logits.shape
    probs = torch.softmax(logits, 1)
    chosen = [probs.argmax(1)]
    if top_k == 2:
        first = F.one_hot(chosen[0], num_experts).bool()
        chosen.append(logits.masked_fill(first, -math.inf).argmax(1))
    masks = [F.one_hot(expert, num_experts) for expert in chosen]
    counts = sum(mask.sum(0) for mask in masks)
    assert isinstance(counts, Tensor)
    if capacity_factor is None:
        capacity = int(counts.max())
    else:
        capacity = max(math.ceil(num_tokens / num_experts * capacity_factor * top_k), _LEAST_CAPACITY)
        capacity = min(capacity, num_tokens)  # more than all of them no expert can take, and empty places are computed
    taken = torch.zeros_like(counts)
    places, gates = [], []
    for expert, mask in zip(chosen, masks, strict=True):
        place = ((mask.cumsum(0) - 1 + taken) * mask).sum(1)
        taken = taken + mask.sum(0)
        places.append(place)
        gates.append(probs.gather(1, expert[:, None])[:, 0] * (place < capacity))
    if top_k == 2:
        total = (gates[0] + gates[1]).clamp(min=torch.finfo(torch.float32).eps)
        gates = [gate / total for gate in gates]
    balance = (probs.mean(0) * masks[0].float().mean(0)).sum() * num_experts
    return Routes(torch.stack(chosen), torch.stack(places), torch.stack(gates), capacity, balance, counts)


class Experts(ExtraLoss):
    """Feed-forward experts behind a router; a drop-in for ``MLP``."""

    def __init__(self, model: ModelSection, parallel: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        assert model.experts is not None
        self.settings: ExpertsSection = model.experts
        self.group, self.sequence, self.activation = parallel.tensor, parallel.sequence, model.activation
        h, f, count = model.hidden_size, ffn_hidden_size(model), self.settings.num_experts
        rows = 2 * f if is_gated(model) else f
        here, shard = count // parallel.tensor.size, Shard(0)
        options: dict[str, Any] = {"dtype": dtype, "device": parallel.device}
        self.first = parallel.tensor.rank * here
        self.router = new_parameter(count, h, init=model.init_std, **options)
        self.up = new_parameter(here, rows, h, init=initial_std(model).up, shard=shard, **options)
        self.down = new_parameter(here, h, f, init=initial_std(model).down, shard=shard, **options)
        self.up_bias: nn.Parameter | None = None
        self.down_bias: nn.Parameter | None = None
        if model.bias:
            self.up_bias = new_parameter(here, rows, init="zeros", shard=shard, **options)
            self.down_bias = new_parameter(here, h, init="zeros", shard=shard, **options)
        self._counts: Tensor | None = None  # what was routed since the last look
        self._seen = torch.zeros(3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        """``x [b, s, h]`` -> ``[b, s, h]``; of this rank's tokens where the ranks share them out."""
        shape = x.shape
        x = gather_tokens(x, self.sequence)
        flat = x.reshape(-1, x.shape[-1])
        logits = F.linear(flat.float(), self.router.float())
        factor = self.settings.capacity_factor if self.training else None
        routes = route(logits, top_k=self.settings.top_k, capacity_factor=factor)
        out = self._mix(copy_to_group(flat, self.group), routes).view(x.shape)
        if self.sequence.size > 1:
            out = reduce_scatter_tokens(out, self.sequence).view(shape)
        else:
            out = reduce_from_group(out, self.group)
        if self.training:
            self._note(routes)
            out = self.minimise(routes.balance, out, self.settings.balance_loss)
        return out

    def _mix(self, flat: Tensor, routes: Routes) -> Tensor:
        """The answers of this rank's experts, weighted and added up: ``[t, h]``."""
        here, (num_tokens, h) = self.up.shape[0], flat.shape
        local = routes.experts - self.first
        kept = (local >= 0) & (local < here) & (routes.places < routes.capacity)
        spare = here * routes.capacity  # one more place, for what goes elsewhere
        slots = torch.where(kept, local * routes.capacity + routes.places, spare)  # [k, t]
        source = slots.new_full((spare + 1,), num_tokens)
        source[slots.reshape(-1)] = torch.arange(num_tokens, device=flat.device).expand_as(slots).reshape(-1)
        padded = torch.cat([flat, flat.new_zeros(1, h)])
        buffer = padded.index_select(0, source[:-1]).view(here, routes.capacity, h)
        answers = self._feed_forward(buffer).reshape(spare, h)
        answers = torch.cat([answers, answers.new_zeros(1, h)])
        gates = copy_to_group(routes.gates, self.group)  # other ranks' experts add to its gradient
        mixed = sum(answers[slot] * gate[:, None] for slot, gate in zip(slots, gates, strict=True))
        assert isinstance(mixed, Tensor)
        return mixed.to(flat.dtype)

    def _feed_forward(self, x: Tensor) -> Tensor:
        """``[experts of this rank, capacity, h]`` -> the same."""
        up = products.bmm(x, self.up.transpose(1, 2))
        if self.up_bias is not None:
            up = up + self.up_bias[:, None]
        if self.activation == "swiglu":
            inner = ops.swiglu(up)
        elif self.activation == "geglu":
            gate, value = up.chunk(2, -1)
            inner = ops.bias_gelu(gate, None) * value
        elif self.activation == "relu":
            inner = F.relu(up)
        else:
            inner = (ops.bias_gelu if self.activation == "gelu" else ops.bias_gelu_erf)(up, None)
        out = products.bmm(inner, self.down.transpose(1, 2))
        return out if self.down_bias is None else out + self.down_bias[:, None]

    @torch.no_grad()
    def _note(self, routes: Routes) -> None:
        """Add up what was routed; no host sync."""
        counts = routes.counts.double()
        dropped = (routes.places >= routes.capacity).double().mean()
        self._counts = counts if self._counts is None else self._counts + counts
        one = torch.ones_like(dropped)
        self._seen = self._seen.to(counts.device) + torch.stack([one, dropped, routes.balance.detach().double()])

    def take_statistics(self, data: Group) -> Tensor | None:
        """Since the last call: (share of the busiest expert times their number, share dropped, balance loss), [3].

        Of the samples of all ranks of ``data``, which all call.
        """
        if self._counts is None:
            return None
        counts, (passes, dropped, balance) = data.all_reduce_(self._counts), data.all_reduce_(self._seen)
        busiest = counts.max() / counts.sum() * len(counts)
        self._counts, self._seen = None, torch.zeros_like(self._seen)
        return torch.stack([busiest, dropped / passes, balance / passes])

    def extra_repr(self) -> str:
        last = self.first + self.up.shape[0] - 1
        return f"experts {self.first} to {last} of {self.settings.num_experts}, {self.settings.top_k} a token"


def routing_statistics(model: nn.Module, parallel: ParallelContext) -> dict[str, float]:
    """What the experts of all stages did with all ranks' samples since the last call; empty where none was routed.

    All ranks call; waits for the device. ``busiest_expert``: tokens that wanted the most wanted expert of any layer, as
    a multiple of an even share; ``dropped``: share of routes that found their expert full; ``balance``: the mean loss.
    """
    found = [module.take_statistics(parallel.data) for module in model.modules() if isinstance(module, Experts)]
    rows = [row for row in found if row is not None]
    table = torch.stack(rows) if rows else torch.zeros(0, 3, dtype=torch.float64, device=parallel.device)
    most = parallel.pipeline.all_reduce_(table.amax(0) if rows else table.new_zeros(3), op="max")
    sums = parallel.pipeline.all_reduce_(torch.cat([table.sum(0), table.new_tensor([float(len(rows))])]))
    busiest, count = float(most[0]), float(sums[3])
    if not count:
        return {}
    return {"busiest_expert": busiest, "dropped": float(sums[1]) / count, "balance": float(sums[2]) / count}
