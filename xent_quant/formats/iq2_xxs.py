"""IQ2_XXS: 2.0625 bits per weight; 256 weights in eight sub-blocks of 32, w = ±d·(2s+1)/8·g, g from 256 points of eight.

| offset | bytes | field |
|---|---|---|
| 0 | 2 | d, float16 |
| 2 | 64 | per sub-block four point numbers, then a little-endian word: s on top of four times 7 signs, as in IQ3_XXS |

One sign in eight is forced, as in IQ3_XXS.

Source of truth: `block_iq2_xxs` in ggml-common.h; the points are gguf-py's.
"""

import numpy as np
from gguf.quants import IQ2_XXS

from xent_quant.formats._codebook import Points, scales_and_signs, signed_scales
from xent_quant.formats._codes import half_bytes, halves
from xent_quant.formats._eights import EightsFormat, Families
from xent_quant.formats.base import U8


class IQ2XXS(EightsFormat):
    name = "IQ2_XXS"
    ggml_type = 16
    block_bytes = 66
    group_size = 32
    unit = np.float32(0.125)
    even_signs = True

    def __init__(self) -> None:
        IQ2_XXS.init_grid()
        self.points = np.ascontiguousarray(IQ2_XXS.grid[0, 0], np.float32)
        self.families = Families.of(self.points)

    def store(self, blocks: U8, points: Points) -> None:
        blocks[:, 0:2] = half_bytes(points.d)
        parts = blocks[:, 2:66].reshape(-1, 8, 8)  # a copy: rows of a block are not adjacent
        parts[:, :, :4] = points.numbers.reshape(-1, 8, 4)
        parts[:, :, 4:] = signed_scales(points.s, points.signs).reshape(-1, 8, 4)
        blocks[:, 2:66] = parts.reshape(-1, 64)

    def load(self, blocks: U8) -> Points:
        parts = blocks[:, 2:66].reshape(-1, 8, 8)
        s, signs = scales_and_signs(parts[:, :, 4:].reshape(-1, 32))
        return Points(parts[:, :, :4].reshape(-1, 32).astype(np.uint16), signs, s, halves(blocks[:, 0:2]))
