"""The C library's heap: when freed memory goes back to the system, and when it is kept.

A page that comes from the system anew is cleared first, which takes longer than many an operation
on it. So a search keeps what it has freed, since the next candidate needs the same blocks again
(docs/speed.md), until memory runs out; everything else gives it back, since there the peak counts.
Nothing happens with another C library than glibc.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of mallopt(3)
LARGE = 4 << 20
REUSED = 32 << 20  # blocks of a small model; in larger ones arithmetic takes all the time
TRIM, HELD = 128 << 10, 1 << 30  # free bytes at the end of the heap


def return_blocks() -> None:
    """Let every block of 4 MB or more go back as soon as it is freed, and all that is free now.

    glibc raises the size from which it does so to that of the largest block freed, up to 32 MB;
    smaller ones stay on a heap that small long-lived tensors keep from shrinking. The edit bases of
    a 0.25 billion parameter model left 350 MB of such holes (bench/memory.md).
    """
    _set(LARGE, TRIM)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def reuse_blocks() -> None:
    """Keep freed blocks of up to 32 MB for what comes next."""
    _set(REUSED, HELD)


def _set(large: int, trim: int) -> None:
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_ARENA_MAX, 1)  # one heap for all threads: what one frees, another uses
        library.mallopt(M_MMAP_THRESHOLD, large)
        library.mallopt(M_TRIM_THRESHOLD, trim)
