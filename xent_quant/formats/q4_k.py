"""Q4_K: 4.5 bits per weight; 256 weights in eight sub-blocks of 32, w = d·s·q − dmin·m with q in 0…15.

| offset | bytes | field |
|---|---|---|
| 0 | 2 | d, float16 |
| 2 | 2 | dmin, float16 |
| 4 | 12 | eight 6-bit scales s and minima m (see `_k_type.scales_and_minima`) |
| 16 | 128 | codes: byte 32g+i holds weight 64g+i in its low nibble and weight 64g+32+i in its high one |

Source of truth: `block_q4_K` in ggml-common.h.
"""

from xent_quant.formats._codes import Plane, halves, integers
from xent_quant.formats._k_type import KType, scales_and_minima
from xent_quant.formats._superblock import affine
from xent_quant.formats.base import F32, U8


class Q4K(KType):
    name = "Q4_K"
    ggml_type = 12
    block_bytes = 144
    group_size = 32
    planes = (Plane(16, 144, bits=4, run=32),)
    levels = integers(0, 15)
    kernel = staticmethod(affine(sub_blocks=8, bits=4, scale_codes=63, block_bytes=144))

    def scales(self, blocks: U8) -> tuple[F32, F32]:
        scales, minima = scales_and_minima(blocks[:, 4:16])
        return halves(blocks[:, 0:2]) * scales, -(halves(blocks[:, 2:4]) * minima)
