"""MXFP4: 4.25 bits per weight; 32 weights, w = d·level, d a power of two, levels 0, ±1, 2, 3, 4, 6, 8, 12 (twice E2M1's).

| offset | bytes | field |
|---|---|---|
| 0 | 1 | e; d = 2^(e − 128), half of E8M0's, so that the levels are integers |
| 1 | 16 | E2M1 codes: weight i in the low nibble of byte i, weight i+16 in its high one; bit 3 is the sign |

Source of truth: `block_mxfp4` in ggml-common.h; the levels are gguf-py's. The two zeros read as one level and are stored as +0.
"""

import numpy as np
from gguf.quants import MXFP4

from xent_quant.formats import _search
from xent_quant.formats._codes import Efforts, Found, Plane, SymmetricFormat, rises
from xent_quant.formats.base import F32, U8, Effort

KVALUES = np.array(MXFP4.kvalues, np.float32)
LEVELS, _first = np.unique(KVALUES, return_index=True)
STORED: U8 = _first.astype(np.uint8)
LEVEL_OF: U8 = np.searchsorted(LEVELS, KVALUES).astype(np.uint8)


class E2M1Format(SymmetricFormat):
    """Codes are E2M1 floats."""

    levels = LEVELS

    def codes(self, packed: U8) -> U8:
        return LEVEL_OF[super().codes(packed)]

    def store_codes(self, packed: U8, codes: U8) -> None:
        super().store_codes(packed, STORED[codes])


class MXFP4Format(E2M1Format):
    name = "MXFP4"
    ggml_type = 39
    block_size = 32
    block_bytes = 17
    group_size = 32
    planes = (Plane(1, 17, bits=4, run=16),)
    largest_scale = np.float32(np.inf)
    efforts = Efforts(
        fast=(np.array([1, 2], np.float32), 0),
        normal=(np.array([0.5, 1, 2], np.float32), 0),
        high=(np.array([0.5, 1, 2, 4], np.float32), 0),
    )
    """Candidates: multiples of the power of two at or below a twelfth of the block's largest weight."""

    def scales(self, blocks: U8) -> tuple[F32, None]:
        return MXFP4.e8m0_to_fp32_half(blocks[:, :1]), None

    def store_scales(self, blocks: U8, found: Found) -> None:
        exponents = found.outer.view(np.uint32) >> np.uint32(23)  # biased by 127; 0 for a block of zeros
        blocks[:, :1] = np.where(exponents > 0, exponents + 1, 0)

    def search(self, weights: F32, importance: F32, effort: Effort) -> Found:
        rows, blocks = weights.shape[0], weights.shape[1] // 32
        codes, outer = np.empty(weights.shape, np.uint8), np.empty((rows, blocks), np.float32)
        candidates, _ = getattr(self.efforts, effort)
        _search.powers(weights, importance, candidates, LEVELS[0], rises(LEVELS), codes.view(np.uint32), outer)
        return Found(codes, np.empty((rows * blocks, 0), np.uint8), outer.reshape(-1, 1))
