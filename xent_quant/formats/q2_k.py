"""Q2_K: 2.625 bits per weight; 256 weights in sixteen sub-blocks of 16, w = d·s·q − dmin·m with q in 0…3.

| offset | bytes | field |
|---|---|---|
| 0 | 16 | per sub-block: 4-bit scale s (low nibble) and minimum m (high nibble) |
| 16 | 64 | codes: byte 32h+i holds weights 128h+i, +32, +64, +96, two bits each from the lowest |
| 80 | 4 | d and dmin, float16 |

Source of truth: `block_q2_K` in ggml-common.h.
"""

import numpy as np

from xent_quant.formats._k_type import KType, halves
from xent_quant.formats._superblock import affine
from xent_quant.formats.base import F32, U8


class Q2K(KType):
    name = "Q2_K"
    ggml_type = 10
    block_bytes = 84
    kernel = staticmethod(affine(sub_blocks=16, bits=2, scale_codes=15, block_bytes=84))

    def dequantize_rows(self, packed: U8) -> F32:
        blocks = packed.reshape(-1, 84)
        d, dmin = halves(blocks[:, 80:82]), halves(blocks[:, 82:84])
        scales, minima = blocks[:, :16] & 15, blocks[:, :16] >> 4
        shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
        codes = ((blocks[:, 16:80].reshape(-1, 2, 1, 32) >> shifts) & 3).reshape(-1, 16, 16).astype(np.float32)
        values = (d * scales)[:, :, None] * codes - (dmin * minima)[:, :, None]
        return values.reshape(packed.shape[0], -1)
