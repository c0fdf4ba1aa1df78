"""IQ3_XXS: 3.0625 bits per weight; 256 weights in eight sub-blocks of 32, w = ±d·(2s+1)/4·g, g from 256 points of four.

| offset | bytes | field |
|---|---|---|
| 0 | 2 | d, float16 |
| 2 | 64 | point numbers, one per four weights |
| 66 | 32 | per sub-block a little-endian word: s on top of four times 7 signs; the eighth makes their number even |

One sign in eight is forced, half of the time against the weight: the search lets it fall on the least w·x². So a column
without importance is lost here (relative error above 1), as in no other type.

Source of truth: `block_iq3_xxs` in ggml-common.h; the points are gguf-py's.
"""

import numpy as np
from gguf.quants import IQ3_XXS

from xent_quant.formats._codebook import CodebookFormat, Points, scales_and_signs, signed_scales
from xent_quant.formats._codes import Efforts, half_bytes, halves, ladder
from xent_quant.formats.base import U8


class IQ3XXS(CodebookFormat):
    name = "IQ3_XXS"
    ggml_type = 18
    block_bytes = 98
    group_size = 32
    unit = np.float32(0.25)
    even_signs = True
    efforts = Efforts(
        fast=(ladder((52, 64, 3)), 1),
        normal=(ladder((48, 66, 4)), 1),
        high=(ladder((42, 80, 16)), 4),
    )

    def __init__(self) -> None:
        IQ3_XXS.init_grid()
        self.points = np.ascontiguousarray(IQ3_XXS.grid[0, 0], np.float32)

    def store(self, blocks: U8, points: Points) -> None:
        blocks[:, 0:2] = half_bytes(points.d)
        blocks[:, 2:66] = points.numbers
        blocks[:, 66:98] = signed_scales(points.s, points.signs)

    def load(self, blocks: U8) -> Points:
        s, signs = scales_and_signs(blocks[:, 66:98])
        return Points(blocks[:, 2:66].astype(np.uint16), signs, s, halves(blocks[:, 0:2]))
