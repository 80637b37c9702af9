"""Shares of a corpus for train, valid and test, cut between documents exactly as Megatron-LM cuts them."""

from __future__ import annotations

from mlm_cli.errors import UsageError

SPLITS = ("train", "valid", "test")


def parse_split(text: str) -> tuple[float, float, float]:
    """``"969,30,1"`` -> shares that sum to one. One or two numbers mean that the others are 0; ``/`` also separates.

    Raises:
        UsageError: not one to three non-negative numbers, or all are 0.
    """
    fields = [field.strip() for field in text.replace("/", ",").split(",")]
    try:
        numbers = [float(field) for field in fields]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 3 or not all(0 <= number < float("inf") for number in numbers) or sum(numbers) <= 0:
        raise UsageError(
            f"data.split: `{text}` is not up to three shares", hint='write train, valid, test as in "969,30,1"'
        )
    numbers += [0.0] * (3 - len(numbers))
    total = sum(numbers)
    return numbers[0] / total, numbers[1] / total, numbers[2] / total


def split_documents(text: str, num_documents: int) -> dict[str, range]:
    """Document ranges of the three splits; they follow each other and cover all documents.

    Ends are the rounded products of cumulated shares, in the floating point and rounding of Megatron-LM
    (``megatron/core/datasets``: parse_and_normalize_split, convert_split_vector_to_split_matrix and the builder), so
    that a corpus is held out identically in both.
    """
    ends = [0.0]
    for share in parse_split(text):
        ends.append(ends[-1] + share)
    cuts = [round(end * float(num_documents)) for end in ends]
    return {name: range(start, stop) for name, start, stop in zip(SPLITS, cuts[:-1], cuts[1:], strict=True)}
