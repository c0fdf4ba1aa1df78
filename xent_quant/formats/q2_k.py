"""Q2_K: 2.625 bits per weight; 256 weights in sixteen sub-blocks of 16, w = d·s·q − dmin·m with q in 0…3.

| offset | bytes | field |
|---|---|---|
| 0 | 16 | per sub-block: 4-bit scale s (low nibble) and minimum m (high nibble) |
| 16 | 64 | codes: byte 32h+i holds weights 128h+i, +32, +64, +96, two bits each from the lowest |
| 80 | 4 | d and dmin, float16 |

Source of truth: `block_q2_K` in ggml-common.h.
"""

from xent_quant.formats._codes import Plane, halves, integers
from xent_quant.formats._k_type import KType
from xent_quant.formats._superblock import affine
from xent_quant.formats.base import F32, U8


class Q2K(KType):
    name = "Q2_K"
    ggml_type = 10
    block_bytes = 84
    planes = (Plane(16, 80, bits=2, run=32),)
    levels = integers(0, 3)
    kernel = staticmethod(affine(sub_blocks=16, bits=2, scale_codes=15, block_bytes=84))

    def scales(self, blocks: U8) -> tuple[F32, F32]:
        d, dmin = halves(blocks[:, 80:82]), halves(blocks[:, 82:84])  # [n, 1]
        return d * (blocks[:, :16] & 15), -(dmin * (blocks[:, :16] >> 4))
