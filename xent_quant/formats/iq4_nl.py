"""IQ4_NL: 4.5 bits per weight; 32 weights, w = d·level with 16 levels from −127 to 113, denser around zero.

| offset | bytes | field |
|---|---|---|
| 0 | 2 | d, float16 |
| 2 | 16 | level numbers: weight i in the low nibble of byte i, weight i+16 in its high one |

Source of truth: `block_iq4_nl` in ggml-common.h; the levels are gguf-py's.
"""

import numpy as np
from gguf.quants import IQ4_NL

from xent_quant.formats._codes import Efforts, Found, Plane, SymmetricFormat, half_bytes, halves, ladder
from xent_quant.formats.base import F32, U8

LEVELS = np.array(IQ4_NL.kvalues, np.float32)
EFFORTS = Efforts(
    fast=(ladder((-123, -145, 4), (109, 131, 4)), 1),
    normal=(ladder((-118, -150, 8), (104, 136, 8)), 2),
    high=(ladder((-115, -180, 32), (101, 166, 32)), 6),
)


class IQ4NL(SymmetricFormat):
    name = "IQ4_NL"
    ggml_type = 20
    block_size = 32
    block_bytes = 18
    group_size = 32
    planes = (Plane(2, 18, bits=4, run=16),)
    levels = LEVELS
    efforts = EFFORTS

    def scales(self, blocks: U8) -> tuple[F32, None]:
        return halves(blocks[:, 0:2]), None

    def store_scales(self, blocks: U8, found: Found) -> None:
        blocks[:, 0:2] = half_bytes(found.outer)
