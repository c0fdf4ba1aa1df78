"""NVFP4: 4.5 bits per weight; 64 weights in four sub-blocks of 16, w = d·level, levels as MXFP4's.

| offset | bytes | field |
|---|---|---|
| 0 | 4 | d of each sub-block: half of an unsigned E4M3, bias 7, without infinity; 0x7F reads as 0, the highest bit is ignored |
| 4 | 32 | E2M1 codes: weight 16j+i in the low nibble of byte 8j+i, weight 16j+8+i in its high one; bit 3 is the sign |

d goes from 2^−10 to 224 in steps of an eighth of a power of two, below 2^−7 of 2^−10: sub-blocks whose largest weight is below
0.006 vanish, and typical weights of 0.02 are coarse. Files of other tools have a scale beside the tensor against that, which
llama-quantize does not write, nor does this.

Source of truth: `block_nvfp4` in ggml-common.h; levels and scales are gguf-py's.
"""

import numpy as np
from gguf.quants import NVFP4

from xent_quant.formats import _search
from xent_quant.formats._codes import Efforts, Found, Plane, ladder, rises
from xent_quant.formats.base import F32, U8, Effort
from xent_quant.formats.mxfp4 import LEVELS, E2M1Format


class NVFP4Format(E2M1Format):
    name = "NVFP4"
    ggml_type = 40
    block_size = 64
    block_bytes = 36
    group_size = 16
    planes = (Plane(4, 36, bits=4, run=8),)
    largest_scale = np.float32(np.inf)
    largest_weight = 2688
    too_large = "a weight exceeds 2688, the largest that NVFP4 holds; keep this tensor in BF16 or F32"
    efforts = Efforts(
        fast=(ladder((9, 15, 3)), 1),
        normal=(ladder((8, 16, 6)), 1),
        high=(ladder((6, 18, 24)), 2),
    )

    def scales(self, blocks: U8) -> tuple[F32, None]:
        return NVFP4.ue4m3_to_fp32(blocks[:, :4]).astype(np.float32), None

    def store_scales(self, blocks: U8, found: Found) -> None:
        raw = found.outer * np.float32(2)
        normal = (raw.view(np.uint32) >> np.uint32(20)) - np.uint32((127 - 7) << 3)  # E4M3 has three bits after the point
        blocks[:, :4] = np.where(raw < 2**-6, raw * np.float32(512), normal)

    def search(self, weights: F32, importance: F32, effort: Effort) -> Found:
        rows, groups = weights.shape[0], weights.shape[1] // 16
        codes, outer = np.empty(weights.shape, np.uint8), np.empty((rows, groups), np.float32)
        candidates, rounds = getattr(self.efforts, effort)
        _search.small_floats(weights, importance, candidates, rounds, LEVELS[0], rises(LEVELS), codes.view(np.uint32), outer)
        return Found(codes, np.empty((rows * groups // 4, 0), np.uint8), outer.reshape(-1, 4))
