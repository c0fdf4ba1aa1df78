"""Q6_K: 6.5625 bits per weight; 256 weights in sixteen sub-blocks of 16, w = d·s·q with q in −32…31, s int8.

| offset | bytes | field |
|---|---|---|
| 0 | 128 | low four bits of q+32: byte 64h+i weights 128h+i and +64, byte 64h+32+i weights 128h+32+i and +64 |
| 128 | 64 | high two bits: byte 32h+i weights 128h+i, +32, +64, +96 from the lowest |
| 192 | 16 | scales s, int8 |
| 208 | 2 | d, float16 |

Source of truth: `block_q6_K` in ggml-common.h.
"""

import numpy as np

from xent_quant.formats._k_type import KType, halves
from xent_quant.formats._superblock import symmetric
from xent_quant.formats.base import F32, U8


class Q6K(KType):
    name = "Q6_K"
    ggml_type = 14
    block_bytes = 210
    kernel = staticmethod(symmetric(bits=6, scale_codes=128, block_bytes=210))

    def dequantize_rows(self, packed: U8) -> F32:
        blocks = packed.reshape(-1, 210)
        d = halves(blocks[:, 208:210])
        scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
        low = blocks[:, :128].reshape(-1, 2, 1, 64)
        low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)  # weights +0, +32, +64, +96
        shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
        high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
        codes = (low | (high << 4)).reshape(-1, 16, 16).astype(np.float32) - np.float32(32)
        values = (d * scales)[:, :, None] * codes
        return values.reshape(packed.shape[0], -1)
