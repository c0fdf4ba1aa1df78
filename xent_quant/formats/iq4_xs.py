"""IQ4_XS: 4.25 bits per weight; 256 weights in eight sub-blocks of 32, w = d·s·level with IQ4_NL's levels, s in −32…31.

| offset | bytes | field |
|---|---|---|
| 0 | 2 | d, float16 |
| 2 | 2 | high two bits of s+32, sub-block j in bits 2j and 2j+1 of a little-endian word |
| 4 | 4 | low four bits, sub-blocks 2j and 2j+1 in the low and the high nibble of byte j |
| 8 | 128 | level numbers: weight 32j+i in the low nibble of byte 16j+i, weight 32j+16+i in its high one |

Source of truth: `block_iq4_xs` in ggml-common.h.
"""

import numpy as np

from xent_quant.formats._codes import Found, Plane, SymmetricFormat, half_bytes, halves
from xent_quant.formats.base import F32, U8
from xent_quant.formats.iq4_nl import EFFORTS, LEVELS

HIGH, LOW = Plane(2, 4, bits=2, run=1), Plane(4, 8, bits=4, run=1)


class IQ4XS(SymmetricFormat):
    name = "IQ4_XS"
    ggml_type = 23
    block_size = 256
    block_bytes = 136
    group_size = 32
    planes = (Plane(8, 136, bits=4, run=16),)
    levels = LEVELS
    scale_low = -32
    efforts = EFFORTS

    def scales(self, blocks: U8) -> tuple[F32, None]:
        codes = LOW.read(blocks) | (HIGH.read(blocks) << np.uint8(4))  # [n, 8]
        return halves(blocks[:, 0:2]) * (codes.astype(np.float32) - np.float32(32)), None

    def store_scales(self, blocks: U8, found: Found) -> None:
        codes: U8 = found.inner + np.uint8(32)
        blocks[:, 0:2] = half_bytes(found.outer)
        LOW.write(blocks, codes)
        HIGH.write(blocks, codes, 4)
