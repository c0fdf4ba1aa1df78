"""IQ1_S: 1.5625 bits per weight; 256 weights in eight sub-blocks of 32, w = d·(2s+1)·(g ± 1/8), g from 2048 points of eight.

| offset | bytes | field |
|---|---|---|
| 0 | 2 | d, float16 |
| 2 | 32 | low eight bits of the point numbers, one per eight weights |
| 34 | 16 | per sub-block a little-endian word: high three bits of its four point numbers, then three of s; bit 15: − 1/8 |

A point's values are −1, 0 and 1.

Source of truth: `block_iq1_s` in ggml-common.h; the points are gguf-py's.
"""

import numpy as np
from gguf.quants import IQ1_S

from xent_quant.formats._codes import half_bytes, halves
from xent_quant.formats._eights import Families, ShiftedFormat, ShiftedPoints
from xent_quant.formats.base import U8

SHIFTS = np.array([0, 3, 6, 9], np.uint16)


class IQ1S(ShiftedFormat):
    name = "IQ1_S"
    ggml_type = 19
    block_bytes = 50
    group_size = 32
    run = 4

    def __init__(self) -> None:
        IQ1_S.init_grid()
        self.points = np.ascontiguousarray(IQ1_S.grid[0, 0], np.float32)
        self.families = Families.of(self.points)

    def store(self, blocks: U8, points: ShiftedPoints) -> None:
        blocks[:, 0:2] = half_bytes(points.d)
        blocks[:, 2:34] = points.numbers & np.uint16(255)
        high = (points.numbers >> np.uint16(8)).reshape(-1, 8, 4)
        words = (high << SHIFTS).sum(axis=2, dtype=np.uint16)
        words |= points.s.astype(np.uint16) << np.uint16(12)
        words |= points.minus.astype(np.uint16) << np.uint16(15)
        blocks[:, 34:50] = words.astype("<u2").view(np.uint8)

    def load(self, blocks: U8) -> ShiftedPoints:
        words = np.ascontiguousarray(blocks[:, 34:50]).view("<u2").astype(np.uint16)  # [n, 8]
        high = ((words[:, :, None] >> SHIFTS) & np.uint16(7)).reshape(-1, 32)
        s = ((words >> np.uint16(12)) & np.uint16(7)).astype(np.uint8)
        minus = (words >> np.uint16(15)).astype(np.uint8)
        return ShiftedPoints(blocks[:, 2:34] | (high << np.uint16(8)), minus, s, halves(blocks[:, 0:2]))
