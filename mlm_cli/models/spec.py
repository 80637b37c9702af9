"""A model as a flat list of layers: one stage runs it as a sequence, several stages share it out.

(After EleutherAI/gpt-neox, ``gpt2_model.py``.) A layer is ``layer(x, info, cache=None) -> x``; what all layers of a
pass share travels in ``info``, which each stage can rebuild from three tensors: tokens, positions and segments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Shared:
    """A module of one ``weight`` that several entries use: the word embedding, by the head; a table of positions.

    Every stage that uses it has it, the first one as its owner, the others as copies that learn the same.

    Attributes:
        name: full name of the module (``embedding.word``).
        build: makes it, its weight unfilled, where no entry of the stage has made it.
    """

    name: str
    build: Callable[[], nn.Module]


@dataclass(frozen=True)
class LayerSpec:
    """How to make one layer of the list.

    Attributes:
        name: prefix of its parameters' full names (``layers.3``); initial weights follow from it.
        build: makes the layer, its weights unfilled.
        cost: share of the work, to balance stages: matrix parameters.
        shared: what it uses, or makes, that other entries use too.
    """

    name: str
    build: Callable[[], nn.Module]
    cost: int = 0
    shared: tuple[Shared, ...] = ()
