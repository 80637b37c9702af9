"""Keep large blocks of host memory between training steps instead of giving them back to the kernel."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


@cache
def keep_freed_memory() -> bool:
    """Ask glibc's allocator to reuse freed blocks of any size; False where it cannot be asked.

    Activations, logits and gradients are allocated and freed in every step. By default each block of some megabytes is
    mapped anew, and the kernel zeroes it page by page: at 2,048 tokens x 8,192 vocabulary that made the output layer's
    product take 27 ms in place of 10. The price: memory of the largest step stays with the process.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_M_TOP_PAD, 64 << 20))
