"""The text of ``data.split``: shares of a corpus for train, valid and test."""

from __future__ import annotations


def parse_split(text: str) -> tuple[float, float, float]:
    """``"969,30,1"`` -> shares that sum to one. One or two numbers mean that the others are 0; ``/`` also separates.

    Raises:
        ValueError: not one to three non-negative numbers, or none for training.
    """
    fields = [field.strip() for field in text.replace("/", ",").split(",")]
    try:
        numbers = [float(field) for field in fields]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 3 or not all(0 <= number < float("inf") for number in numbers) or not numbers[0] > 0:
        raise ValueError('up to three shares (train, valid, test), the first above 0, as in "969,30,1"')
    numbers += [0.0] * (3 - len(numbers))
    total = sum(numbers)
    return numbers[0] / total, numbers[1] / total, numbers[2] / total
