"""What the model families have in common: a list of layers, whole or a stage's part of it, run in sequence."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlm_cli.config.schema import ModelSection
from mlm_cli.models.rotary import RotaryTable
from mlm_cli.models.spec import LayerSpec, Shared
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.parallel.sequence import gather_tokens

if TYPE_CHECKING:
    from mlm_cli.models.contrast import Contrast
    from mlm_cli.parallel.random import RandomStreams

Batch = dict[str, Tensor]


class Model(nn.Module):
    """A language model, or this rank's slice of one, or a stage of a pipeline.

    Args:
        model: architecture, ``vocab_size`` set.
        specs: the family's whole list; the first entry is the embedding, the last the head.
        part: numbers of the entries that are built here; unset: all.
        head: False leaves the head of pretraining out (it is None): a task's stands in its place (``models.heads``).

    Attributes:
        config: the model section it was built from.
        parallel: the groups it is cut over.
        has_embedding, has_head: whether this part begins, or ends, the model.
        recompute: rebuild each layer's activations in the backward pass instead of keeping them.
        streams: dropout streams; set by training when there is dropout.
        contrast: a further loss of the states that ``loss_of`` is given; set by training.
        shared: modules with a weight that several entries of the list use, by name; on several stages a copy each.
        copies: full names of the parameters that an earlier stage owns.
        score_names: what ``scores`` measures.
    """

    score_names: ClassVar[tuple[str, ...]] = ("loss",)

    def __init__(
        self,
        model: ModelSection,
        parallel: ParallelContext,
        dtype: torch.dtype,
        specs: list[LayerSpec],
        part: range | None = None,
        head: bool = True,
    ) -> None:
        super().__init__()
        specs = specs if head else specs[:-1]
        self.config, self.parallel, self.dtype = model, parallel, dtype
        self.recompute = False
        self.streams: RandomStreams | None = None
        self.contrast: Contrast | None = None
        part = range(len(specs)) if part is None else part
        mine = [specs[number] for number in part]
        self.has_embedding, self.has_head = mine[0] is specs[0], mine[-1] is specs[-1]
        self._order: list[tuple[nn.Module, bool]] = []  # with: is it a transformer layer, which may be recomputed?
        self.shared: dict[str, nn.Module] = {}
        for spec in mine:
            self._add(spec)
            for shared in spec.shared:
                self._share(shared)
        owned_before = {shared.name for spec in specs[: part.start] for shared in spec.shared}
        self.copies = frozenset(f"{name}.weight" for name in self.shared if name in owned_before)
        for spec in specs:  # what other stages hold
            container, _, number = spec.name.partition(".")
            if not hasattr(self, container):
                setattr(self, container, nn.ModuleList() if number else None)
        if not head:
            self.head: Any = None
        self._rotary = RotaryTable.of(model)

    def _add(self, spec: LayerSpec) -> None:
        """Layers keep their numbers, so that parameters have the same names whatever part of the model this is."""
        layer = spec.build()
        container, _, number = spec.name.partition(".")
        if number:
            if not hasattr(self, container):
                setattr(self, container, nn.ModuleList())
            getattr(self, container).add_module(number, layer)
        else:
            setattr(self, container, layer)
        if spec.name != "head":  # its work is not a step of `run`
            self._order.append((layer, bool(number)))

    def _share(self, shared: Shared) -> None:
        """Have what an entry shares, made by an entry of this part or here."""
        container, _, name = shared.name.rpartition(".")
        if container and not hasattr(self, container):
            setattr(self, container, nn.Module())
        place = getattr(self, container) if container else self
        if not hasattr(place, name):
            setattr(place, name, shared.build())
        self.shared[shared.name] = getattr(place, name)

    @property
    def vocab_size(self) -> int:
        assert self.config.vocab_size is not None
        return self.config.vocab_size

    @property
    def output_weight(self) -> Tensor:
        """Rows of the output layer of this rank, ``[v_local, h]``; the word embedding's where they are tied."""
        return self.embedding.word.weight if self.head.weight is None else self.head.weight

    def read_outside(self) -> list[Tensor]:
        """Parameters that are used outside of their module's ``forward`` (ZeRO-3 must know)."""
        return [] if self.head is None else [self.output_weight]

    def set_streams(self, streams: RandomStreams) -> None:
        """Draw dropout inside sliced regions from ``streams``."""
        self.streams = streams
        # Where each rank holds other tokens, its masks between sliced layers are its own too.
        masks = streams.sliced if self.parallel.sequence.size > 1 else nullcontext
        for module in self.modules():
            if module is not self and hasattr(module, "streams"):
                module.streams = streams
            if hasattr(module, "masks"):
                module.masks = masks

    @abstractmethod
    def info(self, batch: Batch) -> Any:
        """What every layer shares of a pass over ``batch``; any stage can work it out."""

    def run(self, x: Tensor, info: Any) -> Tensor:
        """The layers of this part, in order. ``x``: tokens ``[b, s]`` where it begins the model, else ``[b, s, h]``."""
        for layer, repeats in self._order:
            x = self._call(layer, repeats, x, info)
        return gather_tokens(x, self.parallel.sequence) if self.has_head else x

    def boundary(self, batch: Batch) -> tuple[int, ...]:
        """Shape of what travels between two stages for ``batch``."""
        b, s = batch["tokens"].shape
        return b, s // (self.parallel.context.size * self.parallel.sequence.size), self.config.hidden_size

    def _call(self, layer: nn.Module, repeats: bool, *args: Any) -> Tensor:
        """Run an entry of the list; where its activations are recomputed, keep its input only (Chen et al. 2016)."""
        if not (repeats and self.recompute and torch.is_grad_enabled()):
            return layer(*args)
        # dropout repeats itself
        dropout = self.training and max(self.config.hidden_dropout, self.config.attention_dropout) > 0
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": dropout}
        if dropout and self.streams is not None:
            options["context_fn"] = self.streams.recompute_contexts
        return checkpoint(layer, *args, **options)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mean loss that training minimises (float32 scalar with gradient), and the predictions it is over."""
        return self.loss_of(self.run(batch["tokens"], self.info(batch)), batch)

    @abstractmethod
    def loss_of(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """``loss`` from what ``run`` gave."""

    def scores(self, batch: Batch) -> Tensor:
        """What validation adds up, float64 ``[len(score_names), 2]``: a sum, and the count it is over."""
        return self.scores_of(self.run(batch["tokens"], self.info(batch)), batch)

    @torch.no_grad()
    def scores_of(self, hidden: Tensor, batch: Batch) -> Tensor:
        """``scores`` from what ``run`` gave."""
        mean, count = self.loss_of(hidden, batch)
        return torch.stack([mean.double() * count, count.double()])[None]

    def count_tokens(self, batch: Batch) -> Tensor:
        """Tokens of a batch that the model reads: what speed and progress are told in."""
        if "lengths" in batch:
            return batch["lengths"].sum()
        return batch["tokens"].new_tensor(batch["tokens"].numel())
