"""Text classification: examples -> token ids and label numbers, padded batches, and the scores of predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlm_cli.data.order import derive_key, permute_many
from mlm_cli.data.tokenizer import Tokenizer
from mlm_cli.errors import DataError
from mlm_cli.tasks.labelled_text import Columns, Example

if TYPE_CHECKING:
    import torch

_WINDOW_BATCHES = 16  # global batches that are sorted by length together


def columns_of(section: Any) -> Columns:
    """The columns that a recipe's ``task`` section (``config.schema.TaskSection``) names."""
    return Columns(section.text_column, section.label_column, section.text_pair_column, section.header)


def label_names(examples: Sequence[Example], given: Sequence[str] | None = None) -> tuple[str, ...]:
    """Names of the classes, in the order of their numbers: as given, else those that occur, sorted (numbers by value).

    Raises:
        DataError: fewer than two.
    """
    if given is not None:
        names = tuple(given)
    else:
        found = {example.label for example in examples}
        numeric = all(label.lstrip("-").isdigit() for label in found)
        names = tuple(sorted(found, key=(lambda label: (int(label), label)) if numeric else None))
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise DataError(
            f"classification needs two or more distinct labels, not {list(names)} (read from {examples[0].where} on)",
            hint="check task.label_column, or name the labels in task.labels",
        )
    return names


@dataclass(frozen=True)
class Features:
    """Examples as numbers: ``ids`` per example (never empty) and ``labels`` int64 [examples]."""

    ids: tuple[np.ndarray, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def encode_examples(
    examples: Sequence[Example], labels: Sequence[str], tokenizer: Tokenizer, max_length: int
) -> Features:
    """Token ids and label numbers.

    A pair is joined by the end-of-document token (a line break where there is none). Too long texts lose their end;
    of a pair the longer text is cut first. An empty text becomes one end-of-document token.

    Raises:
        DataError: a label that is not among ``labels``, naming file and line.
    """
    numbers = {name: number for number, name in enumerate(labels)}
    for example in examples:
        if example.label not in numbers:
            raise DataError(
                f"{example.where}: label `{example.label}` is not one of {', '.join(f'`{name}`' for name in labels)}",
                hint="name all labels in task.labels, or mend the file",
            )
    first = tokenizer.encode_batch([example.text for example in examples])
    joint = [tokenizer.eod_id] if tokenizer.eod_id is not None else tokenizer.encode("\n")
    if any(example.text_pair is not None for example in examples):
        second = tokenizer.encode_batch([example.text_pair or "" for example in examples])
        ids = [_join(a, joint, b, max_length) for a, b in zip(first, second, strict=True)]
    else:
        ids = [tokens[:max_length] for tokens in first]
    arrays = tuple(np.array(tokens or joint[:1], dtype=np.int64) for tokens in ids)
    return Features(arrays, np.array([numbers[example.label] for example in examples], dtype=np.int64))


def _join(first: Sequence[int], joint: Sequence[int], second: Sequence[int], max_length: int) -> list[int]:
    room = max(max_length - len(joint), 0)
    # The shorter keeps all it has while the longer gives way, down to equal halves.
    keep_second = min(len(second), max(room - len(first), room // 2))
    keep_first = min(len(first), room - keep_second)
    return [*first[:keep_first], *joint, *second[:keep_second]][:max_length]


def collate(features: Features, numbers: Sequence[int], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch padded on the right to its longest text.

    Returns:
        ``tokens`` int64 [b, s], ``lengths`` int64 [b], ``labels`` int64 [b], ``sample_ids`` int64 [b].
    """
    import torch

    rows = [features.ids[number] for number in numbers]
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    tokens = np.full((len(rows), int(lengths.max())), pad_id, dtype=np.int64)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = row
    arrays = {
        "tokens": tokens,
        "lengths": lengths,
        "labels": features.labels[list(numbers)],
        "sample_ids": np.array(numbers, dtype=np.int64),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class TrainingOrder:
    """Which examples each global batch holds: every example once an epoch, texts of like length together.

    Draws are numbered over all epochs; draw g is a pure function of (seed, g), so a resume needs one integer. Runs of
    ``16 * global_batch_size`` draws are sorted by length, cut into batches, and the batches put in random order.
    """

    def __init__(self, lengths: Sequence[int], *, global_batch_size: int, seed: int) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.global_batch_size, self.seed = global_batch_size, seed
        self._window: tuple[int, np.ndarray] | None = None
        self._epoch: tuple[int, np.ndarray] | None = None

    def global_batch(self, step: int) -> np.ndarray:
        """Example numbers of global batch ``step``, int64 [global_batch_size], ascending in length."""
        window, place = divmod(step, _WINDOW_BATCHES)
        if self._window is None or self._window[0] != window:
            self._window = (window, self._make_window(window))
        return self._window[1][place]

    def _make_window(self, window: int) -> np.ndarray:
        size = _WINDOW_BATCHES * self.global_batch_size
        drawn = np.array([self._draw(window * size + i) for i in range(size)], dtype=np.int64)
        ordered = drawn[np.argsort(self.lengths[drawn], kind="stable")].reshape(_WINDOW_BATCHES, -1)
        places = permute_many(np.arange(_WINDOW_BATCHES), _WINDOW_BATCHES, derive_key(self.seed, 2, window))
        return ordered[places]

    def _draw(self, number: int) -> int:
        epoch, place = divmod(number, len(self.lengths))
        if self._epoch is None or self._epoch[0] != epoch:
            key = derive_key(self.seed, 1, epoch)
            self._epoch = (epoch, permute_many(np.arange(len(self.lengths)), len(self.lengths), key))
        return int(self._epoch[1][place])


def training_batches(
    features: Features,
    *,
    pad_id: int,
    seed: int,
    micro_batch_size: int,
    global_batch_size: int,
    data_rank: int = 0,
    data_size: int = 1,
    start_sample: int = 0,
) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of one data rank without end, from ``start_sample`` (a multiple of the global batch) on."""
    order = TrainingOrder([len(ids) for ids in features.ids], global_batch_size=global_batch_size, seed=seed)
    step, rest = divmod(start_sample, global_batch_size)
    if rest:
        raise ValueError(f"start_sample {start_sample} is not a multiple of the global batch {global_batch_size}")
    while True:
        numbers = order.global_batch(step)
        for first in range(data_rank * micro_batch_size, global_batch_size, data_size * micro_batch_size):
            yield collate(features, numbers[first : first + micro_batch_size].tolist(), pad_id)
        step += 1


def evaluation_batches(
    features: Features, *, pad_id: int, batch_size: int, data_rank: int = 0, data_size: int = 1
) -> Iterator[dict[str, torch.Tensor]]:
    """Every example once over all data ranks, long ones first."""
    order = np.argsort([-len(ids) for ids in features.ids], kind="stable")
    for first in range(data_rank * batch_size, len(order), data_size * batch_size):
        yield collate(features, order[first : first + batch_size].tolist(), pad_id)


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, num_labels: int) -> np.ndarray:
    """Counts int64 [label, prediction]."""
    return np.bincount(labels * num_labels + predicted, minlength=num_labels**2).reshape(num_labels, num_labels)


def scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """``accuracy`` and ``f1`` of confusion matrices [..., labels, labels], each [...].

    F1 of two classes is that of the second (the positive one); of more, the mean over the classes (macro). A class that
    neither occurs nor is predicted counts 0, as in scikit-learn with ``zero_division=0``.
    """
    right = np.diagonal(confusion, axis1=-2, axis2=-1).astype(float)
    either = confusion.sum(-1) + confusion.sum(-2)
    f1 = np.divide(2 * right, either, out=np.zeros_like(right), where=either > 0)
    total = confusion.sum((-2, -1))
    return {"accuracy": right.sum(-1) / total, "f1": f1[..., 1] if f1.shape[-1] == 2 else f1.mean(-1)}


def standard_errors(confusion: np.ndarray, *, seed: int, draws: int = 1000) -> dict[str, float | None]:
    """Standard error of each score: exact for the accuracy (a mean), by bootstrap over the examples for F1.

    Drawing examples with replacement is drawing a multinomial confusion matrix.
    """
    total = int(confusion.sum())
    if total < 2:
        return {"accuracy": None, "f1": None}
    accuracy = float(scores(confusion)["accuracy"])
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(total, (confusion / total).ravel(), size=draws).reshape(draws, *confusion.shape)
    return {
        "accuracy": (accuracy * (1 - accuracy) / (total - 1)) ** 0.5,
        "f1": float(np.std(scores(drawn)["f1"], ddof=1)),
    }


def score_predictions(predicted: np.ndarray, labels: np.ndarray, num_labels: int) -> Mapping[str, float]:
    """``accuracy`` and ``f1`` of predicted class numbers."""
    found = scores(confusion_matrix(predicted, labels, num_labels))
    return {name: float(value) for name, value in found.items()}
