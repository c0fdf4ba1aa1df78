"""Q8_0: 8.5 bits per weight; 32 weights, w = d·q with q in −127…127.

| offset | bytes | field |
|---|---|---|
| 0 | 2 | d, float16 |
| 2 | 32 | q, int8 |

Source of truth: `block_q8_0` in ggml-common.h.
"""

import numpy as np

from xent_quant.formats._block32 import Block32, block32
from xent_quant.formats._codes import Plane, integers


class Q80Format(Block32):
    name = "Q8_0"
    ggml_type = 8
    block_bytes = 34
    bits = 8
    affine = False
    planes = (Plane(2, 34, bits=8, run=1),)
    levels = integers(-128, 127)
    stored = np.arange(-128, 128).astype(np.uint8)  # two's complement
    kernel = staticmethod(block32(bits=8, affine=False, block_bytes=34))
