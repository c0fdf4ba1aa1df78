"""What all K types share: effort to search depth, and the packed scales of Q4_K and Q5_K."""

from collections.abc import Callable
from typing import ClassVar

import numpy as np

from xent_quant.formats._codes import CodedFormat
from xent_quant.formats._superblock import MESSAGES
from xent_quant.formats.base import F32, U8, Effort

EFFORTS: dict[Effort, tuple[int, int]] = {"fast": (8, 1), "normal": (16, 3), "high": (32, 8)}
"""Candidate step sizes per sub-block, and rounds of scale refinement per super-block."""


class KType(CodedFormat):
    """A type of super-blocks of 256; subclasses set `kernel` (see `_superblock`) and `scales`."""

    block_size = 256
    group_size = 16
    kernel: ClassVar[Callable[..., None]]

    def quantize_rows(self, weights: F32, importance: F32 | None, packed: U8, effort: Effort) -> str:
        if importance is None:
            importance = np.ones(weights.shape[1], np.float32)
        problems = np.zeros(weights.shape[0], np.int8)
        type(self).kernel(weights, importance, packed, problems, *EFFORTS[effort], 256 // self.group_size)
        return MESSAGES[int(problems.max())] if problems.any() else ""


def scales_and_minima(raw: U8) -> tuple[U8, U8]:
    """The 12 bytes of eight 6-bit scales and minima, [n, 12] uint8 to two [n, 8] uint8 (Q4_K and Q5_K)."""
    a, b, c = raw[:, 0:4], raw[:, 4:8], raw[:, 8:12]
    scales = np.concatenate([a & 63, (c & 15) | ((a >> 6) << 4)], axis=1)
    minima = np.concatenate([b & 63, (c >> 4) | ((b >> 6) << 4)], axis=1)
    return scales, minima
