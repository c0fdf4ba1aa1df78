"""IQ1_M: 1.75 bits per weight; 256 weights in sixteen sub-blocks of 16, w = d·(2s+1)·(g ± 1/8), g from IQ1_S's 2048 points.

| offset | bytes | field |
|---|---|---|
| 0 | 32 | low eight bits of the point numbers, one per eight weights |
| 32 | 16 | points 2j and 2j+1 in the low and the high nibble of byte j: high three bits of the number; fourth bit: − 1/8 |
| 48 | 8 | four little-endian words: three bits of s for each of four sub-blocks, above them four bits of d, the lowest first |

d is float16. A point's values are −1, 0 and 1; its eight weights have their own sign of 1/8.

Source of truth: `block_iq1_m` in ggml-common.h; the points are gguf-py's.
"""

import numpy as np
from gguf.quants import IQ1_M

from xent_quant.formats._codes import Plane, half_bytes, halves
from xent_quant.formats._eights import Families, ShiftedFormat, ShiftedPoints
from xent_quant.formats.base import U8

HIGH = Plane(32, 48, bits=4, run=1)
SHIFTS = np.array([0, 3, 6, 9], np.uint16)
D_SHIFTS = np.array([0, 4, 8, 12], np.uint16)


class IQ1M(ShiftedFormat):
    name = "IQ1_M"
    ggml_type = 29
    block_bytes = 56
    group_size = 16
    run = 1

    def __init__(self) -> None:
        IQ1_M.init_grid()
        self.points = np.ascontiguousarray(IQ1_M.grid[0, 0], np.float32)
        self.families = Families.of(self.points)

    def store(self, blocks: U8, points: ShiftedPoints) -> None:
        blocks[:, 0:32] = points.numbers & np.uint16(255)
        HIGH.write(blocks, (points.numbers >> np.uint16(8)).astype(np.uint8) | (points.minus << np.uint8(3)))
        words = (points.s.reshape(-1, 4, 4).astype(np.uint16) << SHIFTS).sum(axis=2, dtype=np.uint16)
        d = half_bytes(points.d).view("<u2").astype(np.uint16)  # [n, 1]
        words |= ((d >> D_SHIFTS) & np.uint16(15)) << np.uint16(12)
        blocks[:, 48:56] = words.astype("<u2").view(np.uint8)

    def load(self, blocks: U8) -> ShiftedPoints:
        high = HIGH.read(blocks)  # [n, 32]
        words = np.ascontiguousarray(blocks[:, 48:56]).view("<u2").astype(np.uint16)  # [n, 4]
        s = ((words[:, :, None] >> SHIFTS) & np.uint16(7)).astype(np.uint8).reshape(-1, 16)
        d = ((words >> np.uint16(12)) << D_SHIFTS).sum(axis=1, dtype=np.uint16)
        numbers = blocks[:, 0:32] | ((high & np.uint8(7)).astype(np.uint16) << np.uint16(8))
        return ShiftedPoints(numbers, high >> np.uint8(3), s, halves(d.astype("<u2").view(np.uint8).reshape(-1, 2)))
