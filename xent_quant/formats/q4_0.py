"""Q4_0: 4.5 bits per weight; 32 weights, w = d·q with q in −8…7, stored as q+8.

| offset | bytes | field |
|---|---|---|
| 0 | 2 | d, float16 |
| 2 | 16 | low four bits: weight i in the low nibble of byte i, weight i+16 in its high one |

Source of truth: `block_q4_0` in ggml-common.h.
"""

from xent_quant.formats._block32 import Block32, block32
from xent_quant.formats._codes import Plane, integers


class Q40Format(Block32):
    name = "Q4_0"
    ggml_type = 2
    block_bytes = 18
    bits = 4
    affine = False
    planes = (Plane(2, 18, bits=4, run=16),)
    levels = integers(-8, 7)
    kernel = staticmethod(block32(bits=4, affine=False, block_bytes=18))
