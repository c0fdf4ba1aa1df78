"""Q5_K: 5.5 bits per weight; 256 weights in eight sub-blocks of 32, w = d·s·q − dmin·m with q in 0…31.

| offset | bytes | field |
|---|---|---|
| 0 | 4 | d and dmin, float16 |
| 4 | 12 | eight 6-bit scales and minima, as in Q4_K |
| 16 | 32 | fifth bits: bit j of byte i belongs to weight 32j+i |
| 48 | 128 | low four bits, as in Q4_K |

Source of truth: `block_q5_K` in ggml-common.h.
"""

from xent_quant.formats._codes import AffineFormat, Efforts, Found, Plane, half_bytes, halves, integers, plane
from xent_quant.formats._k_scales import pack_scales_and_minima, scales_and_minima
from xent_quant.formats.base import F32, U8


class Q5K(AffineFormat):
    name = "Q5_K"
    ggml_type = 13
    block_size = 256
    block_bytes = 176
    group_size = 32
    planes = (Plane(48, 176, bits=4, run=32), Plane(16, 48, bits=1, run=32))
    levels = integers(0, 31)
    scale_top = 63
    efforts = Efforts(
        fast=(plane(31, 1, 4, 0.5, 3), 1),
        normal=(plane(31, 1.2, 8, 0.5, 3), 2),
        high=(plane(31, 2, 16, 0.7, 7), 6),
    )

    def scales(self, blocks: U8) -> tuple[F32, F32]:
        scales, minima = scales_and_minima(blocks[:, 4:16])
        return halves(blocks[:, 0:2]) * scales, -(halves(blocks[:, 2:4]) * minima)

    def store_scales(self, blocks: U8, found: Found) -> None:
        blocks[:, 0:4] = half_bytes(found.outer)
        pack_scales_and_minima(found.inner, blocks[:, 4:16])
