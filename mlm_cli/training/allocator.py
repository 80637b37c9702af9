"""Keeping freed memory: on the CPU a training step allocates and frees the same large blocks again and again."""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h
_TOP_PAD = 64 << 20  # bytes by which the heap grows at once


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep what is freed; returns whether it does.

    By default every block above 32 MB, and often smaller ones, is a mapping of its own: freed, it goes back to the
    kernel, which hands it out again page by page, zeroed. That took a tenth of a step's processor time (30M parameters,
    vocabulary 50,304). The peak of memory stays what it was. A ``MALLOC_*`` variable set by the user wins.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD))
    return all(mallopt(name, value) == 1 for name, value in settings)
