"""Q4_0: 4.5 bits per weight; 32 weights, w = d·q with q in −8…7, stored as q+8.

| offset | bytes | field |
|---|---|---|
| 0 | 2 | d, float16 |
| 2 | 16 | low four bits: weight i in the low nibble of byte i, weight i+16 in its high one |

Source of truth: `block_q4_0` in ggml-common.h.
"""

from xent_quant.formats._codes import Efforts, Found, Plane, SymmetricFormat, half_bytes, halves, integers, ladder
from xent_quant.formats.base import F32, U8


class Q40(SymmetricFormat):
    name = "Q4_0"
    ggml_type = 2
    block_size = 32
    block_bytes = 18
    group_size = 32
    planes = (Plane(2, 18, bits=4, run=16),)
    levels = integers(-8, 7)
    efforts = Efforts(
        fast=(ladder((-7.6, -10, 4), (6.6, 9, 4)), 1),
        normal=(ladder((-7.4, -11, 8), (6.4, 10, 8)), 2),
        high=(ladder((-7, -14, 32), (6, 13, 32)), 6),
    )

    def scales(self, blocks: U8) -> tuple[F32, None]:
        return halves(blocks[:, 0:2]), None

    def store_scales(self, blocks: U8, found: Found) -> None:
        blocks[:, 0:2] = half_bytes(found.outer)
