"""Q8_0: 8.5 bits per weight; 32 weights, w = d·q with q in −127…127.

| offset | bytes | field |
|---|---|---|
| 0 | 2 | d, float16 |
| 2 | 32 | q, int8 |

Source of truth: `block_q8_0` in ggml-common.h.
"""

from xent_quant.formats._codes import Efforts, Found, Plane, SymmetricFormat, half_bytes, halves, integers, ladder
from xent_quant.formats.base import F32, U8


class Q80(SymmetricFormat):
    name = "Q8_0"
    ggml_type = 8
    block_size = 32
    block_bytes = 34
    group_size = 32
    planes = (Plane(2, 34, bits=8, run=32),)
    levels = integers(-128, 127)
    flip = 0x80  # two's complement
    unused = 1
    efforts = Efforts(
        fast=(ladder((-127, -127.6, 2)), 1),
        normal=(ladder((-127, -127.6, 2)), 1),
        high=(ladder((-126, -134, 32)), 6),
    )

    def scales(self, blocks: U8) -> tuple[F32, None]:
        return halves(blocks[:, 0:2]), None

    def store_scales(self, blocks: U8, found: Found) -> None:
        blocks[:, 0:2] = half_bytes(found.outer)
