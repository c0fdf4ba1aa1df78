"""TQ2_0: 2.0625 bits per weight; 256 weights, w = d·q with q in −1, 0, 1, stored as q+1.

| offset | bytes | field |
|---|---|---|
| 0 | 64 | two bits: weight 128h+32j+i in bits 2j and 2j+1 of byte 32h+i |
| 64 | 2 | d, float16 |

ggml reads the fourth code as 2. The type is for ternary weights, so nothing here writes it.

Source of truth: `block_tq2_0` in ggml-common.h.
"""

from dataclasses import replace

from xent_quant.formats._codes import Found, Plane, SymmetricFormat, half_bytes, halves, integers
from xent_quant.formats.base import F32, U8, Grid
from xent_quant.formats.tq1_0 import EFFORTS


class TQ20(SymmetricFormat):
    name = "TQ2_0"
    ggml_type = 35
    block_size = 256
    block_bytes = 66
    group_size = 256
    planes = (Plane(0, 64, bits=2, run=32),)
    levels = integers(-1, 2)
    outer_halves = (64,)
    unused_above = 1
    efforts = EFFORTS

    def scales(self, blocks: U8) -> tuple[F32, None]:
        return halves(blocks[:, 64:66]), None

    def store_scales(self, blocks: U8, found: Found) -> None:
        blocks[:, 64:66] = half_bytes(found.outer)

    def grid(self, packed: U8) -> Grid:
        return replace(super().grid(packed), levels=self.searched)
