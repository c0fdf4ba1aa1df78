"""Q5_0: 5.5 bits per weight; 32 weights, w = d·q with q in −16…15, stored as q+16.

| offset | bytes | field |
|---|---|---|
| 0 | 2 | d, float16 |
| 2 | 4 | fifth bits, weight i in bit i |
| 6 | 16 | low four bits: weight i in the low nibble of byte i, weight i+16 in its high one |

Source of truth: `block_q5_0` in ggml-common.h.
"""

from xent_quant.formats._block32 import Block32, block32
from xent_quant.formats._codes import Plane, integers


class Q50Format(Block32):
    name = "Q5_0"
    ggml_type = 6
    block_bytes = 22
    bits = 5
    affine = False
    planes = (Plane(6, 22, bits=4, run=16), Plane(2, 6, bits=1, run=1))
    levels = integers(-16, 15)
    kernel = staticmethod(block32(bits=5, affine=False, block_bytes=22))
