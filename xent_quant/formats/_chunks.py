"""A matrix in chunks of rows over numba's number of threads: kernels release the interpreter lock, rows do not mix."""

from collections.abc import Callable
from functools import partial

import numpy as np

from xent_quant import parallel
from xent_quant.formats._lanes import WIDTH
from xent_quant.formats.base import F32, U8
from xent_quant.values import largest

NOT_FINITE = "NaN or infinite weight; the checkpoint is damaged"
TOO_LARGE = "a block's scale exceeds float16 (65504); keep this tensor in BF16 or F32"
LIMIT = 1e15
"""Beyond it sums of squares leave float32; float16 scales end long before."""
CHUNK = 1 << 18
"""Weights that one thread works on at a time: its codes, a byte each, stay in the cache."""


def in_chunks(weights: F32, packed: U8, work: Callable[[F32, U8], str]) -> str:
    """`work` on rows of weights [rows, columns] and packed [rows, row_bytes]; returns the first problem, or ""."""

    def chunk(start: int) -> str:
        part = weights[start : start + rows]
        magnitude = largest(part)
        if not magnitude < LIMIT:
            return TOO_LARGE if np.isfinite(magnitude) else NOT_FINITE
        return work(part, packed[start : start + rows])

    if not weights.size:
        return ""
    rows = max(1, CHUNK // weights.shape[1] // WIDTH) * WIDTH
    problems = parallel.run([partial(chunk, start) for start in range(0, len(weights), rows)])
    return next(filter(None, problems), "")
