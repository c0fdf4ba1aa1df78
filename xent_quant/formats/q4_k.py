"""Q4_K: 4.5 bits per weight; 256 weights in eight sub-blocks of 32, w = d·s·q − dmin·m with q in 0…15.

| offset | bytes | field |
|---|---|---|
| 0 | 2 | d, float16 |
| 2 | 2 | dmin, float16 |
| 4 | 12 | eight 6-bit scales s and minima m (see `_k_scales.scales_and_minima`) |
| 16 | 128 | codes: byte 32g+i holds weight 64g+i in its low nibble and weight 64g+32+i in its high one |

Source of truth: `block_q4_K` in ggml-common.h.
"""

from xent_quant.formats._codes import AffineFormat, Efforts, Found, Plane, half_bytes, halves, integers, plane
from xent_quant.formats._k_scales import pack_scales_and_minima, scales_and_minima
from xent_quant.formats.base import F32, U8


class Q4K(AffineFormat):
    name = "Q4_K"
    ggml_type = 12
    block_size = 256
    block_bytes = 144
    group_size = 32
    planes = (Plane(16, 144, bits=4, run=32),)
    levels = integers(0, 15)
    scale_top = 63
    efforts = Efforts(
        fast=(plane(15, 1, 4, 0.5, 3), 1),
        normal=(plane(15, 1.2, 8, 0.5, 3), 2),
        high=(plane(15, 2, 16, 0.7, 7), 6),
    )

    def scales(self, blocks: U8) -> tuple[F32, F32]:
        scales, minima = scales_and_minima(blocks[:, 4:16])
        return halves(blocks[:, 0:2]) * scales, -(halves(blocks[:, 2:4]) * minima)

    def store_scales(self, blocks: U8, found: Found) -> None:
        blocks[:, 0:4] = half_bytes(found.outer)
        pack_scales_and_minima(found.inner, blocks[:, 4:16])
