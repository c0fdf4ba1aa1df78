"""Q4_1: 5 bits per weight; 32 weights, w = d·q + m with q in 0…15.

| offset | bytes | field |
|---|---|---|
| 0 | 2 | d, float16 |
| 2 | 2 | m, float16 |
| 4 | 16 | low four bits: weight i in the low nibble of byte i, weight i+16 in its high one |

Source of truth: `block_q4_1` in ggml-common.h.
"""

from xent_quant.formats._block32 import Block32, block32
from xent_quant.formats._codes import Plane, integers


class Q41Format(Block32):
    name = "Q4_1"
    ggml_type = 3
    block_bytes = 20
    bits = 4
    affine = True
    planes = (Plane(4, 20, bits=4, run=16),)
    levels = integers(0, 15)
    kernel = staticmethod(block32(bits=4, affine=True, block_bytes=20))
