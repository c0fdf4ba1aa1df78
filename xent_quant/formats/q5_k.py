"""Q5_K: 5.5 bits per weight; 256 weights in eight sub-blocks of 32, w = d·s·q − dmin·m with q in 0…31.

| offset | bytes | field |
|---|---|---|
| 0 | 4 | d and dmin, float16 |
| 4 | 12 | eight 6-bit scales and minima, as in Q4_K |
| 16 | 32 | fifth bits: bit j of byte i belongs to weight 32j+i |
| 48 | 128 | low four bits, as in Q4_K |

Source of truth: `block_q5_K` in ggml-common.h.
"""

from xent_quant.formats._codes import Plane, halves, integers
from xent_quant.formats._k_type import KType, scales_and_minima
from xent_quant.formats._superblock import affine
from xent_quant.formats.base import F32, U8


class Q5K(KType):
    name = "Q5_K"
    ggml_type = 13
    block_bytes = 176
    group_size = 32
    planes = (Plane(48, 176, bits=4, run=32), Plane(16, 48, bits=1, run=32))
    levels = integers(0, 31)
    kernel = staticmethod(affine(sub_blocks=8, bits=5, scale_codes=63, block_bytes=176))

    def scales(self, blocks: U8) -> tuple[F32, F32]:
        scales, minima = scales_and_minima(blocks[:, 4:16])
        return halves(blocks[:, 0:2]) * scales, -(halves(blocks[:, 2:4]) * minima)
