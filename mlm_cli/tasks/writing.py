"""Tasks whose answers are texts: translations, summaries, replies. The model writes them with its own output layer.

A T5 reads the text with its encoder and writes with its decoder (Raffel et al. 2020, section 2.4); a causal model
writes on behind the text (Radford et al. 2019, section 3.6). Only what is to be written counts in the loss.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from mlm_cli import log
from mlm_cli.config.schema import ModelSection, TaskSection
from mlm_cli.data.special_tokens import Frame
from mlm_cli.errors import DataError, UsageError
from mlm_cli.models.heads import HeadSpec
from mlm_cli.tasks.encoding import Row, TextEncoder
from mlm_cli.tasks.features import Features
from mlm_cli.tasks.labelled_text import TABLES, Example, columns_of, read_examples
from mlm_cli.tasks.parallel_text import find_parallel, read_parallel
from mlm_cli.tasks.task import Batch, Scores, Task
from mlm_cli.tasks.text_scores import Scorer, answer_scores, bleu_and_chrf, rouge


class Writing(Task):
    """Mean cross entropy of the words to be written; each kind has its own scores of whole texts, written greedily.

    Attributes:
        start_id: what a T5's decoder begins with (its padding token); None for causal models.
        end_id: ends every text that is learned.
        end_ids: each of them ends a text that is written.
        one_line: texts are scored without their line breaks.

    Raises:
        UsageError: no room for a text beside its answer; a suffix that the tokenizer drops.
        DataError: a tokenizer without a token that ends a text, or, for a T5, without one that pads.
    """

    kept: ClassVar[tuple[str, ...]] = ("prefix", "suffix", "max_target_length")
    one_line: ClassVar[bool] = False

    def __init__(self, section: TaskSection, encoder: TextEncoder, labels: Sequence[str] = ()) -> None:
        super().__init__(section, encoder, labels)
        tokenizer, self.two_stacks = encoder.tokenizer, encoder.family == "t5"
        if tokenizer.eod_id is None:
            raise DataError(f"tokenizer `{tokenizer.spec}` has no token that ends a text, and answers have an end")
        if self.two_stacks and tokenizer.pad_id is None:
            raise DataError(f"tokenizer `{tokenizer.spec}` has no padding token, which a T5's texts begin with")
        self.end_id, self.start_id = tokenizer.eod_id, encoder.pad_id if self.two_stacks else None
        self.end_ids = frozenset({self.end_id})
        self.affixes = affixes_of({"prefix": section.prefix, "suffix": section.suffix}, encoder.family)
        suffix = self.affixes[1]
        if not self.two_stacks and suffix and tokenizer.encode(f"a{suffix}") == tokenizer.encode("a"):
            raise UsageError(
                f"tokenizer `{tokenizer.spec}` drops the suffix {suffix!r}: nothing would say where a text ends",
                hint="use task.suffix=' =>' or the like",
            )
        self._frame = Frame(tokenizer, ends=self.two_stacks)
        self._room = encoder.max_length - (0 if self.two_stacks else section.max_target_length)
        if self._room <= self._length("") + 1:
            raise UsageError(
                f"{encoder.max_length} tokens leave no room for a text"
                + ("" if self.two_stacks else f" beside task.max_target_length {section.max_target_length}"),
                hint="raise task.max_length, as far as the model's context goes"
                + ("" if self.two_stacks else ", or lower task.max_target_length"),
            )
        self.scorer: Scorer = self.make_scorer(section)

    @staticmethod
    def make_scorer(section: TaskSection) -> Scorer:
        """What texts are scored with. Raises UsageError: a package is missing."""
        return answer_scores()

    @staticmethod
    def check_family(model: ModelSection) -> None:
        if model.family not in ("gpt", "t5"):
            raise UsageError(
                f"a model of the {model.family} family fills gaps, and does not write texts",
                hint="start from a model of the gpt or t5 family",
            )

    @staticmethod
    def architecture(model: ModelSection) -> str:
        return ""  # the class of pretraining

    @staticmethod
    def read(path: str, section: TaskSection) -> list[Example]:
        """Examples of a file, or of two with aligned lines, whose names begin with ``path`` (`train` of `train.en`)."""
        aligned = find_parallel(path, section.text_column, section.label_column)
        if aligned is not None:
            return read_parallel(*aligned)
        try:
            return read_examples(path, columns_of(section))
        except DataError as error:
            if error.hint is None and not {*Path(path).suffixes} & {*TABLES}:
                names = " and ".join(f"{path}.{column}" for column in (section.text_column, section.label_column))
                raise DataError(
                    error.message,
                    hint=f"aligned lines are named by what their two files begin with; {names} are not there",
                ) from None
            raise

    def features(self, examples: Sequence[Example], *, training: bool = False) -> Features:
        """A unit an example: its text as a row, its (first) answer behind it. Too long ones lose their ends."""
        prefix, suffix = self.affixes
        texts = self.encoder.tokenizer.encode_batch([f"{prefix}{example.text}{suffix}" for example in examples])
        answers = self.encoder.tokenizer.encode_batch([example.label for example in examples])
        most = self.section.max_target_length - 1
        if cut := sum(len(ids) > most for ids in answers):
            log.warn(
                f"{cut:,} of {len(answers):,} texts to be written are longer than task.max_target_length "
                f"{most + 1} tokens and lose their ends"
            )
        return Features(
            tuple(self._row(ids, example.text) for ids, example in zip(texts, examples, strict=True)),
            self.encoder.pad_id,
            answers=tuple(np.array([*ids[:most], self.end_id], dtype=np.int64) for ids in answers),
            start_id=self.start_id,
        )

    def _row(self, ids: list[int], text: str) -> Row:
        """``ids`` of the text between its prefix and suffix; where they are too many, the text itself is cut."""
        surplus = len(self._frame.around(ids)) - self._room
        if surplus > 0:
            ends = [end for _, end in self.encoder.tokenizer.reference.encode(text, add_special_tokens=False).offsets]
            keep = len(ends) - surplus
            # Cut elsewhere the last words may be other tokens, a few more of them.
            while keep > 0 and self._length(text[: ends[keep - 1]]) > self._room:
                keep -= 1
            ids = self._encode(text[: ends[keep - 1]] if keep > 0 else "")
        whole = np.array(self._frame.around(ids), dtype=np.int64)
        return Row(whole, np.zeros(len(whole), np.int64), len(self._frame.begin), len(ids))

    def _encode(self, text: str) -> list[int]:
        prefix, suffix = self.affixes
        return self.encoder.tokenizer.encode(f"{prefix}{text}{suffix}")

    def _length(self, text: str) -> int:
        return len(self._frame.around(self._encode(text)))

    @property
    def head(self) -> HeadSpec:
        return HeadSpec("words")

    def loss(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return outputs[0], outputs[1].detach()

    def count_tokens(self, batch: Batch) -> Tensor:
        read = super().count_tokens(batch)
        return read + batch["loss_mask"].sum().to(read.dtype) if self.two_stacks else read

    @staticmethod
    def check_together(sections: Mapping[str, TaskSection]) -> None:
        if len(sections) > 1:
            raise UsageError("texts that several models write have no mean", hint="evaluate the models one by one")

    def score(self, answers: Sequence[str], examples: Sequence[Example], *, seed: int) -> Scores:
        """``answers``: a text for each example."""
        texts = [" ".join(answer.split()) if self.one_line else answer.strip() for answer in answers]
        references = [list(example.references or (example.label,)) for example in examples]
        found = self.scorer(texts, references)
        facts: dict[str, Any] = {**found.facts, "empty": sum(not text for text in texts)}
        return Scores(found.metrics, found.stderr, facts, _files(texts, references, examples))


class Translation(Writing):
    """BLEU and chrF of the whole file, 0 to 100 as sacrebleu gives them."""

    name: ClassVar[str] = "translation"
    one_line: ClassVar[bool] = True

    @staticmethod
    def make_scorer(section: TaskSection) -> Scorer:
        return bleu_and_chrf(section.bleu_tokenize)


class Summarization(Writing):
    """ROUGE F-measures, 0 to 1; of several references the best one counts."""

    name: ClassVar[str] = "summarization"

    @staticmethod
    def make_scorer(section: TaskSection) -> Scorer:
        return rouge(section.rouge_tokenize)


class TextGeneration(Writing):
    """Any text for a text (replies, answers): words in common (F1) and exact matches, as SQuAD compares texts."""

    name: ClassVar[str] = "text_generation"


def affixes_of(settings: Mapping[str, Any], family: str) -> tuple[str, str]:
    """What stands before and behind a text, from ``task.prefix`` and ``task.suffix``."""
    suffix = settings.get("suffix")
    # Behind a causal model's text something has to say where it ends.
    return str(settings.get("prefix") or ""), ("" if family == "t5" else "\n") if suffix is None else str(suffix)


def _files(texts: Sequence[str], references: Sequence[Sequence[str]], examples: Sequence[Example]) -> dict[str, str]:
    """What was written: a text a line, and with its source and references as JSON lines."""
    records = (
        {"source": example.text, "references": list(gold), "prediction": text, "where": example.where}
        for text, gold, example in zip(texts, references, examples, strict=True)
    )
    return {
        "predictions.txt": "".join(" ".join(text.split()) + "\n" for text in texts),
        "predictions.jsonl": "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
    }
