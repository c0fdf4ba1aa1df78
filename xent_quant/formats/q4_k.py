"""Q4_K: 4.5 bits per weight; 256 weights in eight sub-blocks of 32, w = d·s·q − dmin·m with q in 0…15.

| offset | bytes | field |
|---|---|---|
| 0 | 2 | d, float16 |
| 2 | 2 | dmin, float16 |
| 4 | 12 | eight 6-bit scales s and minima m (see `_k_type.scales_and_minima`) |
| 16 | 128 | codes: byte 32g+i holds weight 64g+i in its low nibble and weight 64g+32+i in its high one |

Source of truth: `block_q4_K` in ggml-common.h.
"""

import numpy as np

from xent_quant.formats._k_type import KType, halves, scales_and_minima
from xent_quant.formats._superblock import affine
from xent_quant.formats.base import F32, U8


class Q4K(KType):
    name = "Q4_K"
    ggml_type = 12
    block_bytes = 144
    sub_blocks = 8
    kernel = staticmethod(affine(sub_blocks=8, bits=4, scale_codes=63, block_bytes=144))

    def dequantize_rows(self, packed: U8) -> F32:
        blocks = packed.reshape(-1, 144)
        d, dmin = halves(blocks[:, 0:2]), halves(blocks[:, 2:4])  # [n, 1]
        scales, minima = scales_and_minima(blocks[:, 4:16])
        qs = blocks[:, 16:].reshape(-1, 4, 1, 32)
        codes = np.concatenate([qs & 15, qs >> 4], axis=2).reshape(-1, 8, 32).astype(np.float32)
        values = (d * scales)[:, :, None] * codes - (dmin * minima)[:, :, None]
        return values.reshape(packed.shape[0], -1)
