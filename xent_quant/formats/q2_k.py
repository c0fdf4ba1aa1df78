"""Q2_K: 2.625 bits per weight; 256 weights in sixteen sub-blocks of 16, w = d·s·q − dmin·m with q in 0…3.

| offset | bytes | field |
|---|---|---|
| 0 | 16 | per sub-block: 4-bit scale s (low nibble) and minimum m (high nibble) |
| 16 | 64 | codes: byte 32h+i holds weights 128h+i, +32, +64, +96, two bits each from the lowest |
| 80 | 4 | d and dmin, float16 |

Source of truth: `block_q2_K` in ggml-common.h.
"""

from xent_quant.formats._codes import AffineFormat, Efforts, Found, Plane, half_bytes, halves, integers, plane
from xent_quant.formats.base import F32, U8


class Q2K(AffineFormat):
    name = "Q2_K"
    ggml_type = 10
    block_size = 256
    block_bytes = 84
    group_size = 16
    planes = (Plane(16, 80, bits=2, run=32),)
    levels = integers(0, 3)
    outer_halves = (80, 82)
    scale_top = 15
    efforts = Efforts(
        fast=(plane(3, 0.9, 4, 0.5, 3), 1),
        normal=(plane(3, 0.9, 8, 0.5, 3), 2),
        high=(plane(3, 0.9, 16, 0.5, 7), 6),
    )

    def scales(self, blocks: U8) -> tuple[F32, F32]:
        d, dmin = halves(blocks[:, 80:82]), halves(blocks[:, 82:84])  # [n, 1]
        return d * (blocks[:, :16] & 15), -(dmin * (blocks[:, :16] >> 4))

    def store_scales(self, blocks: U8, found: Found) -> None:
        blocks[:, :16] = found.inner[:, :16] | (found.inner[:, 16:] << 4)
        blocks[:, 80:84] = half_bytes(found.outer)
