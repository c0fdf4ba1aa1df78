"""Q6_K: 6.5625 bits per weight; 256 weights in sixteen sub-blocks of 16, w = d·s·q with q in −32…31, s int8.

| offset | bytes | field |
|---|---|---|
| 0 | 128 | low four bits of q+32: byte 64h+i weights 128h+i and +64, byte 64h+32+i weights 128h+32+i and +64 |
| 128 | 64 | high two bits: byte 32h+i weights 128h+i, +32, +64, +96 from the lowest |
| 192 | 16 | scales s, int8 |
| 208 | 2 | d, float16 |

Source of truth: `block_q6_K` in ggml-common.h.
"""

import numpy as np

from xent_quant.formats._codes import Efforts, Found, Plane, SymmetricFormat, half_bytes, halves, integers, ladder
from xent_quant.formats.base import F32, U8


class Q6K(SymmetricFormat):
    name = "Q6_K"
    ggml_type = 14
    block_size = 256
    block_bytes = 210
    group_size = 16
    planes = (Plane(0, 128, bits=4, run=64), Plane(128, 192, bits=2, run=32))
    levels = integers(-32, 31)
    scale_low = -128
    efforts = Efforts(
        fast=(ladder((-31.1, -32.9, 3), (30.1, 31.9, 3)), 1),
        normal=(ladder((-31.1, -32.9, 6), (30.1, 31.9, 6)), 2),
        high=(ladder((-30.5, -38, 40), (29.5, 37, 40)), 6),
    )

    def scales(self, blocks: U8) -> tuple[F32, None]:
        return halves(blocks[:, 208:210]) * blocks[:, 192:208].view(np.int8).astype(np.float32), None

    def store_scales(self, blocks: U8, found: Found) -> None:
        blocks[:, 192:208] = found.inner
        blocks[:, 208:210] = half_bytes(found.outer)
