"""Q5_1: 6 bits per weight; 32 weights, w = d·q + m with q in 0…31.

| offset | bytes | field |
|---|---|---|
| 0 | 2 | d, float16 |
| 2 | 2 | m, float16 |
| 4 | 4 | fifth bits, weight i in bit i |
| 8 | 16 | low four bits: weight i in the low nibble of byte i, weight i+16 in its high one |

Source of truth: `block_q5_1` in ggml-common.h.
"""

from xent_quant.formats._block32 import Block32, block32
from xent_quant.formats._codes import Plane, integers


class Q51Format(Block32):
    name = "Q5_1"
    ggml_type = 7
    block_bytes = 24
    bits = 5
    affine = True
    planes = (Plane(8, 24, bits=4, run=16), Plane(4, 8, bits=1, run=1))
    levels = integers(0, 31)
    kernel = staticmethod(block32(bits=5, affine=True, block_bytes=24))
