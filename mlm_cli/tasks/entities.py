"""Entities in sequences of tags, and their precision, recall and F1 as the official ``conlleval`` counts them.

(Tjong Kim Sang and Buchholz 2000; ``conlleval.pl``, the scorer of the CoNLL-2000 and 2003 shared tasks.) An entity is
right if its type and both its ends are. Tags are IOB1, IOB2, IOE or BILOU/IOBES: where a tag is at odds with its
neighbours, a change of type begins a new entity, as ``conlleval`` has it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Entity = tuple[str, int, int]  # type, first token, last token

_BEGINS = frozenset("BSU")  # of a new entity whatever stood before; S and U are entities of one token
_ENDS = frozenset("ESLU")


def split_tag(tag: str) -> tuple[str, str]:
    """``B-PER`` -> (``B``, ``PER``); ``O`` -> (``O``, ````)."""
    prefix, _, kind = tag.partition("-")
    return (prefix, kind) if tag != "O" else ("O", "")


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of one sentence."""
    found: list[Entity] = []
    open_kind: str | None = None
    begin = 0
    previous = "O"
    for place, tag in enumerate([*tags, "O"]):
        prefix, kind = split_tag(tag)
        broken = prefix == "O" or prefix in _BEGINS or previous in _ENDS or kind != open_kind
        if open_kind is not None and broken:
            found.append((open_kind, begin, place - 1))
            open_kind = None
        if prefix != "O" and open_kind is None:
            open_kind, begin = kind, place
        previous = prefix
    return found


@dataclass
class EntityCounts:
    """What was there, what was found and what of it is right, by type; and tokens."""

    gold: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    right_tokens: int = 0

    def add(self, gold: Sequence[str], predicted: Sequence[str]) -> None:
        """One sentence's tags."""
        there, found = entities(gold), entities(predicted)
        self.gold.update(kind for kind, _, _ in there)
        self.found.update(kind for kind, _, _ in found)
        self.right.update(kind for kind, _, _ in set(there) & set(found))
        self.tokens += len(gold)
        self.right_tokens += sum(a == b for a, b in zip(gold, predicted, strict=True))

    def scores(self, kinds: Iterable[str] | None = None) -> dict[str, float]:
        """``precision``, ``recall`` and ``f1`` over the entities of ``kinds`` (unset: all); 0 where there are none."""
        chosen = list(self.gold | self.found) if kinds is None else list(kinds)
        gold, found, right = (sum(counts[kind] for kind in chosen) for counts in (self.gold, self.found, self.right))
        precision, recall = right / found if found else 0.0, right / gold if gold else 0.0
        both = precision + recall
        return {"f1": 2 * precision * recall / both if both else 0.0, "precision": precision, "recall": recall}

    def accuracy(self) -> float:
        """Tokens with the right tag, of all."""
        return self.right_tokens / self.tokens if self.tokens else 0.0
