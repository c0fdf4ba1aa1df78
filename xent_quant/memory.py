"""What glibc's allocator keeps: matrices that come and go leave holes in its heaps, which other matrices do not fit. Elsewhere
nothing is done."""

import ctypes
import os
import sys
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Of malloc.h."""

MATRIX = 8 << 20
"""Bytes from which an array is a mapping of its own, given back where it is let go; glibc itself would raise its limit to 32 MiB,
above an expert's matrices."""
KEPT = 64 << 20
"""Bytes that may be free at the end of the heap until `give_back`: by itself glibc gives back what the next part asks for."""


@cache
def _libc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt") else None  # other C libraries have neither


def settle() -> None:
    """For a program to say before it loads torch. Threads that begin later share a heap: those of their own have 64 MiB each, too
    little for three matrices. These are mappings of their own, torch's of pages of 2 MiB: asking for smaller ones takes long. Up
    to KEPT bytes at the heap's end are kept when they are free, until `give_back`."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if libc := _libc():
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_MMAP_THRESHOLD, MATRIX)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)


def give_back() -> None:
    """Holes in the heap, to the system. Two threads on an A4.2B layer held a GiB more without."""
    if libc := _libc():
        libc.malloc_trim(0)
