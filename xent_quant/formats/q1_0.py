"""Q1_0: 1.125 bits per weight; 128 weights, w = ±d.

| offset | bytes | field |
|---|---|---|
| 0 | 2 | d, float16 |
| 2 | 16 | weight i in bit i mod 8 of byte i / 8; a set bit is +d |

The best signs are the weights', the best d is their mean magnitude weighted by importance: nothing is left to search for. No
zero: a zero weight beside others becomes −d or d.

Source of truth: `block_q1_0` in ggml-common.h.
"""

import numpy as np

from xent_quant.formats._codes import Efforts, Found, Plane, SymmetricFormat, half_bytes, halves, ladder
from xent_quant.formats.base import F32, U8


class Q10(SymmetricFormat):
    name = "Q1_0"
    ggml_type = 41
    block_size = 128
    block_bytes = 18
    has_zero = False
    group_size = 128
    planes = (Plane(2, 18, bits=1, run=1),)
    levels = np.array([-1, 1], np.float32)
    outer_halves = (0,)
    efforts = Efforts(fast=(ladder((1, 1, 1)), 1), normal=(ladder((1, 1, 1)), 1), high=(ladder((1, 1, 1)), 1))

    def scales(self, blocks: U8) -> tuple[F32, None]:
        return halves(blocks[:, 0:2]), None

    def store_scales(self, blocks: U8, found: Found) -> None:
        blocks[:, 0:2] = half_bytes(found.outer)
