"""Token classification: a tag for every token of a sentence, such as named entities (CoNLL-2003, WNUT-17)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from mlm_cli.config.schema import ModelSection, TaskSection
from mlm_cli.errors import DataError
from mlm_cli.models.heads import HeadSpec
from mlm_cli.tasks.classification import negative_log
from mlm_cli.tasks.conll import Sentence, read_conll
from mlm_cli.tasks.entities import EntityCounts, split_tag
from mlm_cli.tasks.features import IGNORED, Features
from mlm_cli.tasks.task import Batch, HeadTask, Scores


@dataclass(frozen=True)
class _Part:
    """Tokens [begin, stop) of sentence ``sentence``: their pieces, and where each token's first piece is among them."""

    sentence: int
    begin: int
    stop: int
    pieces: list[int]
    firsts: list[int]


class TokenClassification(HeadTask):
    """Cross entropy of the tag at each token's first piece (Devlin et al. 2019, section 5.3); F1 of whole entities.

    A sentence too long for the model becomes several rows, cut between tokens: none is left without a tag.
    """

    name: ClassVar[str] = "token_classification"
    has_labels: ClassVar[bool] = True

    @staticmethod
    def architecture(model: ModelSection) -> str:
        return "ForTokenClassification"

    @staticmethod
    def read(path: str, section: TaskSection) -> list[Sentence]:
        columns = [
            value if isinstance(value, int) else default
            for value, default in ((section.text_column, 0), (section.label_column, -1))
        ]
        return read_conll(path, *columns)

    @staticmethod
    def find_labels(examples: Sequence[Sentence], section: TaskSection) -> tuple[str, ...]:
        """The tags of the training file. Where it has ``B-`` tags, every type gets its ``B-`` and its ``I-``."""
        if section.labels is not None:
            return section.labels
        found = {tag for sentence in examples for tag in sentence.tags}
        if any(tag.startswith("B-") for tag in found) and {split_tag(tag)[0] for tag in found} <= {"B", "I", "O"}:
            kinds = {split_tag(tag)[1] for tag in found} - {""}
            found |= {f"{prefix}-{kind}" for kind in kinds for prefix in "BI"}
        if len(found) < 2:
            raise DataError(
                f"tags need two or more kinds, not {sorted(found)} (read from {examples[0].where} on)",
                hint="check task.label_column: a number from 0, or from the last with -1",
            )
        return tuple(sorted(found))

    def features(self, examples: Sequence[Sentence], *, training: bool = False) -> Features:
        """Raises DataError at a tag that is not among the task's, naming file and sentence."""
        numbers = {name: number for number, name in enumerate(self.labels)}
        rows, labels, places = [], [], []
        for part in self._parts(examples):
            row = self.encoder.join(part.pieces)
            tags = examples[part.sentence].tags[part.begin : part.stop]
            wrong = next((tag for tag in tags if tag not in numbers), None)
            if wrong is not None:
                raise DataError(
                    f"{examples[part.sentence].where}: tag `{wrong}` in this sentence is not one of "
                    f"{', '.join(f'`{name}`' for name in self.labels)}",
                    hint="name all tags in task.labels, or mend the file",
                )
            target = np.full(len(row), IGNORED, dtype=np.int64)
            target[[row.begin_first + first for first in part.firsts]] = [numbers[tag] for tag in tags]
            rows.append(row)
            labels.append(target)
            places.append((part.sentence, part.begin))
        return Features(
            tuple(rows),
            self.encoder.pad_id,
            {"places": np.array(places, dtype=np.int64)},
            token_labels=tuple(labels),
        )

    def _parts(self, examples: Sequence[Sentence]) -> Iterator[_Part]:
        room = self.encoder.room()
        for number, (sentence, pieces) in enumerate(zip(examples, self._pieces(examples), strict=True)):
            begin, ids, firsts = 0, list[int](), list[int]()
            for place, piece in enumerate(pieces):
                if ids and len(ids) + len(piece) > room:
                    yield _Part(number, begin, place, ids, firsts)
                    begin, ids, firsts = place, [], []
                firsts.append(len(ids))
                ids += piece[:room]  # a single token may be longer than all there is room for
            yield _Part(number, begin, len(sentence.tokens), ids, firsts)

    def _pieces(self, examples: Sequence[Sentence]) -> list[list[list[int]]]:
        """Pieces of each token of each sentence, at least one.

        A causal model's tokens are as they would stand in text, with a space before all but the first.
        """
        tokenizer, apart = self.encoder.tokenizer, not self.encoder.marked
        words = [
            [f" {token}" if apart and place else token for place, token in enumerate(sentence.tokens)]
            for sentence in examples
        ]
        known = list({word: None for sentence in words for word in sentence})
        unknown = [tokenizer.unk_id if tokenizer.unk_id is not None else self.encoder.pad_id]
        ids = {word: found or unknown for word, found in zip(known, tokenizer.encode_batch(known), strict=True)}
        return [[ids[word] for word in sentence] for sentence in words]

    @property
    def head(self) -> HeadSpec:
        return HeadSpec("token", len(self.labels))

    def loss(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(outputs.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)
        return loss, (batch["labels"] != IGNORED).sum()

    def predict(self, outputs: Tensor, batch: Batch) -> list[np.ndarray]:
        """Probabilities of the tags of each row's tokens, float64 [tokens, tags]."""
        shares, labelled = outputs.double().softmax(-1).cpu(), (batch["labels"] != IGNORED).cpu()
        return [row[mask].numpy() for row, mask in zip(shares, labelled, strict=True)]

    def answers(
        self, predictions: Sequence[np.ndarray], features: Features, examples: Sequence[Sentence]
    ) -> list[np.ndarray]:
        """Probabilities of the tags of each sentence's tokens, the parts of long ones put together."""
        found = [np.zeros((len(sentence.tokens), len(self.labels))) for sentence in examples]
        for (sentence, begin), shares in zip(features.targets["places"].tolist(), predictions, strict=True):
            found[sentence][begin : begin + len(shares)] = shares
        return found

    def reordered(self, answers: Sequence[np.ndarray], order: Sequence[int]) -> list[np.ndarray]:
        return [shares[:, list(order)] for shares in answers]

    def loss_of(self, answers: Sequence[np.ndarray], examples: Sequence[Sentence]) -> float:
        numbers = {name: number for number, name in enumerate(self.labels)}
        return negative_log(
            row[numbers[tag]]
            for shares, sentence in zip(answers, examples, strict=True)
            for row, tag in zip(shares, sentence.tags, strict=True)
        )

    def score(self, answers: Sequence[np.ndarray], examples: Sequence[Sentence], *, seed: int) -> Scores:
        tags = [[self.labels[number] for number in shares.argmax(-1).tolist()] for shares in answers]
        counts = EntityCounts()
        for sentence, predicted in zip(examples, tags, strict=True):
            counts.add(sentence.tags, predicted)
        kinds = sorted(counts.gold | counts.found)
        facts: dict[str, Any] = {
            "labels": list(self.labels),
            "entities": {"gold": counts.gold.total(), "found": counts.found.total(), "right": counts.right.total()},
            "by_type": {kind: {**counts.scores([kind]), "gold": counts.gold[kind]} for kind in kinds},
        }
        lines = (
            "".join(f"{token} {gold} {mine}\n" for token, gold, mine in zip(s.tokens, s.tags, found, strict=True))
            for s, found in zip(examples, tags, strict=True)
        )
        return Scores(
            {**counts.scores(), "accuracy": counts.accuracy()},
            facts=facts,
            predictions={"predictions.conll": "\n".join(lines)},
        )
