"""Q3_K: 3.4375 bits per weight; 256 weights in sixteen sub-blocks of 16, w = d·s·q with q in −4…3, s in −32…31.

| offset | bytes | field |
|---|---|---|
| 0 | 32 | highest bit of q+4: bit j of byte i belongs to weight 32j+i |
| 32 | 64 | low two bits, as in Q2_K |
| 96 | 12 | s+32: bytes 0…7 low nibbles of scale j and j+8; bytes 8…11 high two bits of scales j, j+4, j+8, j+12 |
| 108 | 2 | d, float16 |

Source of truth: `block_q3_K` in ggml-common.h.
"""

import numpy as np

from xent_quant.formats._k_type import KType, halves
from xent_quant.formats._superblock import symmetric
from xent_quant.formats.base import F32, U8


class Q3K(KType):
    name = "Q3_K"
    ggml_type = 11
    block_bytes = 110
    kernel = staticmethod(symmetric(bits=3, scale_codes=32, block_bytes=110))

    def dequantize_rows(self, packed: U8) -> F32:
        blocks = packed.reshape(-1, 110)
        d = halves(blocks[:, 108:110])
        nibbles = np.concatenate([blocks[:, 96:104] & 15, blocks[:, 96:104] >> 4], axis=1)  # [n, 16]
        shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 4, 1)
        tops = ((blocks[:, None, 104:108] >> shifts) & 3).reshape(-1, 16)
        scales = (nibbles | (tops << 4)).astype(np.float32) - np.float32(32)
        low = ((blocks[:, 32:96].reshape(-1, 2, 1, 32) >> shifts[:, None]) & 3).reshape(-1, 8, 32)
        high = ((blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None]) & 1) << 2  # [n, 8, 32]
        codes = (low | high).reshape(-1, 16, 16).astype(np.float32) - np.float32(4)
        values: F32 = (d * scales)[:, :, None] * codes
        return values.reshape(packed.shape[0], -1)
