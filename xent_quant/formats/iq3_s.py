"""IQ3_S: 3.4375 bits per weight; 256 weights in eight sub-blocks of 32, w = ±d·(2s+1)·g, g from 512 points of four.

| offset | bytes | field |
|---|---|---|
| 0 | 2 | d, float16 |
| 2 | 64 | low eight bits of the point numbers, one per four weights |
| 66 | 8 | ninth bits, point i in bit i mod 8 of byte i / 8 |
| 74 | 32 | signs, weight i in bit i mod 8 of byte i / 8 |
| 106 | 4 | s, sub-blocks 2j and 2j+1 in the low and the high nibble of byte j |

Source of truth: `block_iq3_s` in ggml-common.h; the points are gguf-py's.
"""

import numpy as np
from gguf.quants import IQ3_S

from xent_quant.formats._codebook import CodebookFormat, Points
from xent_quant.formats._codes import Efforts, Plane, half_bytes, halves, ladder
from xent_quant.formats.base import U8

SCALES = Plane(106, 110, bits=4, run=1)


class IQ3S(CodebookFormat):
    name = "IQ3_S"
    ggml_type = 21
    block_bytes = 110
    group_size = 32
    unit = np.float32(1)
    efforts = Efforts(
        fast=(ladder((13, 16, 3)), 1),
        normal=(ladder((12.5, 16.5, 4)), 1),
        high=(ladder((11, 20, 16)), 4),
    )

    def __init__(self) -> None:
        IQ3_S.init_grid()
        self.points = np.ascontiguousarray(IQ3_S.grid[0, 0], np.float32)

    def store(self, blocks: U8, points: Points) -> None:
        blocks[:, 0:2] = half_bytes(points.d)
        blocks[:, 2:66] = points.numbers & np.uint16(255)
        blocks[:, 66:74] = np.packbits(points.numbers > 255, axis=1, bitorder="little")
        blocks[:, 74:106] = points.signs
        SCALES.write(blocks, points.s)

    def load(self, blocks: U8) -> Points:
        high = np.unpackbits(blocks[:, 66:74], axis=1, bitorder="little").astype(np.uint16)
        return Points(
            blocks[:, 2:66] | (high << np.uint16(8)), blocks[:, 74:106], SCALES.read(blocks), halves(blocks[:, 0:2])
        )  # fmt: skip
