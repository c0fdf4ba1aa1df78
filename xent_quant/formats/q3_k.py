"""Q3_K: 3.4375 bits per weight; 256 weights in sixteen sub-blocks of 16, w = d·s·q with q in −4…3, s in −32…31.

| offset | bytes | field |
|---|---|---|
| 0 | 32 | highest bit of q+4: bit j of byte i belongs to weight 32j+i |
| 32 | 64 | low two bits, as in Q2_K |
| 96 | 12 | s+32: bytes 0…7 low nibbles of scale j and j+8; bytes 8…11 high two bits of scales j, j+4, j+8, j+12 |
| 108 | 2 | d, float16 |

Source of truth: `block_q3_K` in ggml-common.h.
"""

import numpy as np

from xent_quant.formats._codes import Efforts, Found, Plane, SymmetricFormat, half_bytes, halves, integers, ladder
from xent_quant.formats.base import F32, U8

LOW, HIGH = Plane(96, 104, bits=4, run=8), Plane(104, 108, bits=2, run=4)


class Q3K(SymmetricFormat):
    name = "Q3_K"
    ggml_type = 11
    block_size = 256
    block_bytes = 110
    group_size = 16
    planes = (Plane(32, 96, bits=2, run=32), Plane(0, 32, bits=1, run=32))
    levels = integers(-4, 3)
    outer_halves = (108,)
    scale_low = -32
    efforts = Efforts(
        fast=(ladder((-3.6, -6, 3), (2.6, 5, 3)), 1),
        normal=(ladder((-3.6, -6, 6), (2.6, 5, 6)), 2),
        high=(ladder((-3.5, -8, 16), (2.5, 7, 16)), 6),
    )

    def scales(self, blocks: U8) -> tuple[F32, None]:
        low, high = LOW.read(blocks), HIGH.read(blocks)  # [n, 16]
        return halves(blocks[:, 108:110]) * ((low | (high << 4)).astype(np.float32) - np.float32(32)), None

    def store_scales(self, blocks: U8, found: Found) -> None:
        codes: U8 = found.inner + np.uint8(32)
        LOW.write(blocks, codes)
        HIGH.write(blocks, codes, 4)
        blocks[:, 108:110] = half_bytes(found.outer)
