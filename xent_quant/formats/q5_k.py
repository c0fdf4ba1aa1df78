"""Q5_K: 5.5 bits per weight; 256 weights in eight sub-blocks of 32, w = d·s·q − dmin·m with q in 0…31.

| offset | bytes | field |
|---|---|---|
| 0 | 4 | d and dmin, float16 |
| 4 | 12 | eight 6-bit scales and minima, as in Q4_K |
| 16 | 32 | fifth bits: bit j of byte i belongs to weight 32j+i |
| 48 | 128 | low four bits, as in Q4_K |

Source of truth: `block_q5_K` in ggml-common.h.
"""

import numpy as np

from xent_quant.formats._k_type import KType, halves, scales_and_minima
from xent_quant.formats._superblock import affine
from xent_quant.formats.base import F32, U8


class Q5K(KType):
    name = "Q5_K"
    ggml_type = 13
    block_bytes = 176
    sub_blocks = 8
    kernel = staticmethod(affine(sub_blocks=8, bits=5, scale_codes=63, block_bytes=176))

    def dequantize_rows(self, packed: U8) -> F32:
        blocks = packed.reshape(-1, 176)
        d, dmin = halves(blocks[:, 0:2]), halves(blocks[:, 2:4])
        scales, minima = scales_and_minima(blocks[:, 4:16])
        high = (blocks[:, 16:48, None] >> np.arange(8, dtype=np.uint8)) & 1  # [n, 32, 8]
        qs = blocks[:, 48:].reshape(-1, 4, 1, 32)
        low = np.concatenate([qs & 15, qs >> 4], axis=2).reshape(-1, 8, 32)
        codes = (low | (high.transpose(0, 2, 1) << 4)).astype(np.float32)
        values: F32 = (d * scales)[:, :, None] * codes - (dmin * minima)[:, :, None]
        return values.reshape(packed.shape[0], -1)
