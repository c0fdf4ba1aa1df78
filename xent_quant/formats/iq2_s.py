"""IQ2_S: 2.5625 bits per weight; 256 weights in sixteen sub-blocks of 16, w = ±d·(2s+1)/8·g, g from 1024 points of eight.

| offset | bytes | field |
|---|---|---|
| 0 | 2 | d, float16 |
| 2 | 32 | low eight bits of the point numbers, one per eight weights |
| 34 | 32 | signs, weight i in bit i mod 8 of byte i / 8 |
| 66 | 8 | high two bits, point i in bits 2(i mod 4) of byte i / 4 |
| 74 | 8 | s, sub-blocks 2j and 2j+1 in the low and the high nibble of byte j |

Source of truth: `block_iq2_s` in ggml-common.h; the points are gguf-py's.
"""

import numpy as np
from gguf.quants import IQ2_S

from xent_quant.formats._codebook import Points
from xent_quant.formats._codes import Plane, half_bytes, halves
from xent_quant.formats._eights import EightsFormat, Families
from xent_quant.formats.base import U8

HIGH, SCALES = Plane(66, 74, bits=2, run=1), Plane(74, 82, bits=4, run=1)


class IQ2S(EightsFormat):
    name = "IQ2_S"
    ggml_type = 22
    block_bytes = 82
    group_size = 16
    unit = np.float32(0.125)

    def __init__(self) -> None:
        IQ2_S.init_grid()
        self.points = np.ascontiguousarray(IQ2_S.grid[0, 0], np.float32)
        self.families = Families.of(self.points)

    def store(self, blocks: U8, points: Points) -> None:
        blocks[:, 0:2] = half_bytes(points.d)
        blocks[:, 2:34] = points.numbers & np.uint16(255)
        blocks[:, 34:66] = points.signs
        HIGH.write(blocks, (points.numbers >> np.uint16(8)).astype(np.uint8))
        SCALES.write(blocks, points.s)

    def load(self, blocks: U8) -> Points:
        numbers = blocks[:, 2:34] | (HIGH.read(blocks).astype(np.uint16) << np.uint16(8))
        return Points(numbers, blocks[:, 34:66], SCALES.read(blocks), halves(blocks[:, 0:2]))
