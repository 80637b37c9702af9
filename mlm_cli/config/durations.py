"""Durations as people and Slurm write them."""

from __future__ import annotations

import re

_CLOCK = re.compile(r"^(?:(\d+)-)?(\d+):([0-5]?\d):([0-5]?\d)$")


def parse_duration(text: str | float) -> float:
    """Seconds of ``90`` (minutes), ``1:30:00`` (H:MM:SS) or ``2-12:00:00`` (days).

    Raises:
        ValueError: none of these, or not above 0.
    """
    match = _CLOCK.match(str(text).strip())
    if match is not None:
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        total = float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    else:
        total = float(text) * 60
    if not 0 < total < float("inf"):
        raise ValueError(f"{text} is no length of time")
    return total
