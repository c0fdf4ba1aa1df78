"""What glibc's allocator keeps: matrices that come and go leave holes in its heaps, which other matrices do not fit. Elsewhere
nothing is done."""

import ctypes
import sys
from functools import cache

M_ARENA_MAX = -8
"""Of malloc.h."""


@cache
def _libc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt") else None  # other C libraries have neither


def one_heap() -> None:
    """Threads that begin later share it; those of their own have 64 MiB each, room for two matrices. For a program to say."""
    if libc := _libc():
        libc.mallopt(M_ARENA_MAX, 1)


def give_back() -> None:
    """Holes in the heap, to the system. Two threads on an A4.2B layer held a GiB more without."""
    if libc := _libc():
        libc.malloc_trim(0)
