"""Signs of life of this process: whoever makes progress says so, whoever watches can tell how long ago that was.

The lowest floors call ``beat()`` after every piece of work that may take seconds; it costs less than a microsecond.
``training/watchdog.py`` does the watching.
"""

from __future__ import annotations

import time

count = 0
warm = False  # has a first step been done? Until then one piece of work may take much longer
last = time.monotonic()


def beat() -> None:
    """Progress was made."""
    global count, last
    count += 1
    last = time.monotonic()


def first_step_done() -> None:
    """From now on pieces of work take about equally long."""
    global warm
    warm = True
    beat()


def silence() -> float:
    """Seconds since the last progress."""
    return time.monotonic() - last
