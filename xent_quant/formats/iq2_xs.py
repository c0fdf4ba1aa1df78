"""IQ2_XS: 2.3125 bits per weight; 256 weights in sixteen sub-blocks of 16, w = ±d·(2s+1)/8·g, g from 512 points of eight.

| offset | bytes | field |
|---|---|---|
| 0 | 2 | d, float16 |
| 2 | 64 | per eight weights a little-endian word: 9 bits of the point number, 7 signs above; the eighth makes their number even |
| 66 | 8 | s, sub-blocks 2j and 2j+1 in the low and the high nibble of byte j |

One sign in eight is forced, as in IQ3_XXS.

Source of truth: `block_iq2_xs` in ggml-common.h; the points are gguf-py's.
"""

import numpy as np
from gguf.quants import IQ2_XS

from xent_quant.formats._codebook import Points, with_eighth
from xent_quant.formats._codes import Plane, half_bytes, halves
from xent_quant.formats._eights import EightsFormat, Families
from xent_quant.formats.base import U8

SCALES = Plane(66, 74, bits=4, run=1)


class IQ2XS(EightsFormat):
    name = "IQ2_XS"
    ggml_type = 17
    block_bytes = 74
    group_size = 16
    unit = np.float32(0.125)
    even_signs = True

    def __init__(self) -> None:
        IQ2_XS.init_grid()
        self.points = np.ascontiguousarray(IQ2_XS.grid[0, 0], np.float32)
        self.families = Families.of(self.points)

    def store(self, blocks: U8, points: Points) -> None:
        blocks[:, 0:2] = half_bytes(points.d)
        words = points.numbers | ((points.signs & np.uint8(127)).astype(np.uint16) << np.uint16(9))
        blocks[:, 2:66] = words.astype("<u2").view(np.uint8)
        SCALES.write(blocks, points.s)

    def load(self, blocks: U8) -> Points:
        words = np.ascontiguousarray(blocks[:, 2:66]).view("<u2").astype(np.uint16)  # [n, 32]
        signs = with_eighth((words >> np.uint16(9)).astype(np.uint8))
        return Points(words & np.uint16(511), signs, SCALES.read(blocks), halves(blocks[:, 0:2]))
