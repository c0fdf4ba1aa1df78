"""Q5_0: 5.5 bits per weight; 32 weights, w = d·q with q in −16…15, stored as q+16.

| offset | bytes | field |
|---|---|---|
| 0 | 2 | d, float16 |
| 2 | 4 | fifth bits, weight i in bit i |
| 6 | 16 | low four bits: weight i in the low nibble of byte i, weight i+16 in its high one |

Source of truth: `block_q5_0` in ggml-common.h.
"""

from xent_quant.formats._codes import Efforts, Found, Plane, SymmetricFormat, half_bytes, halves, integers, ladder
from xent_quant.formats.base import F32, U8


class Q50(SymmetricFormat):
    name = "Q5_0"
    ggml_type = 6
    block_size = 32
    block_bytes = 22
    group_size = 32
    planes = (Plane(6, 22, bits=4, run=16), Plane(2, 6, bits=1, run=1))
    levels = integers(-16, 15)
    efforts = Efforts(
        fast=(ladder((-15.4, -18, 5), (14.4, 17, 5)), 1),
        normal=(ladder((-15.4, -19, 8), (14.4, 18, 8)), 2),
        high=(ladder((-15, -24, 48), (14, 23, 48)), 6),
    )

    def scales(self, blocks: U8) -> tuple[F32, None]:
        return halves(blocks[:, 0:2]), None

    def store_scales(self, blocks: U8, found: Found) -> None:
        blocks[:, 0:2] = half_bytes(found.outer)
