"""Q5_1: 6 bits per weight; 32 weights, w = d·q + m with q in 0…31.

| offset | bytes | field |
|---|---|---|
| 0 | 2 | d, float16 |
| 2 | 2 | m, float16 |
| 4 | 4 | fifth bits, weight i in bit i |
| 8 | 16 | low four bits: weight i in the low nibble of byte i, weight i+16 in its high one |

Source of truth: `block_q5_1` in ggml-common.h.
"""

import numpy as np

from xent_quant.formats._codes import AffineFormat, Efforts, Found, Plane, half_bytes, halves, integers, plane
from xent_quant.formats.base import F32, U8

SIGNS = np.array([1, -1], np.float32)  # the search's minimum is subtracted, this type's added


class Q51(AffineFormat):
    name = "Q5_1"
    ggml_type = 7
    block_size = 32
    block_bytes = 24
    group_size = 32
    planes = (Plane(8, 24, bits=4, run=16), Plane(4, 8, bits=1, run=1))
    levels = integers(0, 31)
    efforts = Efforts(
        fast=(plane(31, 1, 4, 0.5, 3), 1),
        normal=(plane(31, 1.2, 8, 0.5, 3), 2),
        high=(plane(31, 2, 16, 0.7, 7), 6),
    )

    def scales(self, blocks: U8) -> tuple[F32, F32]:
        return halves(blocks[:, 0:2]), halves(blocks[:, 2:4])

    def store_scales(self, blocks: U8, found: Found) -> None:
        blocks[:, 0:4] = half_bytes(found.outer * SIGNS + np.float32(0))  # no −0
