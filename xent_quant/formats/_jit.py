"""How kernels are compiled: cached on disk where a folder can be written, else anew in every process."""

import logging
from collections.abc import Callable
from typing import Any

import numba

log = logging.getLogger(__name__)
_noted = False


def jit(function: Callable[..., Any]) -> Any:
    """numba without the interpreter lock, IEEE division by zero, nothing fused or reordered. The first use compiles (seconds)
    and is cached beside the source, or under NUMBA_CACHE_DIR or the user's cache folder; where none can be written, every
    process compiles, and the log says so once."""
    global _noted
    try:
        return numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # numba finds no folder
        if not _noted:
            _noted = True
            log.warning("no folder for compiled kernels can be written: compiling anew; set NUMBA_CACHE_DIR to one that can")
        return numba.njit(nogil=True, error_model="numpy")(function)
