"""F32, F16 and BF16: one weight per block, no search. BF16 is the upper half of a float32; both round ties to even."""

import numpy as np

from xent_quant.formats.base import F32, U8, Effort, QuantFormat

NOT_FINITE = "NaN or infinite weight; the checkpoint is damaged"


class F32Format(QuantFormat):
    """4 bytes, IEEE single, little-endian."""

    name, ggml_type, block_size, block_bytes = "F32", 0, 1, 4

    def quantize_rows(self, weights: F32, importance: F32 | None, packed: U8, effort: Effort) -> str:
        packed.view("<f4")[:] = weights
        return "" if np.isfinite(weights).all() else NOT_FINITE

    def dequantize_rows(self, packed: U8) -> F32:
        return packed.view("<f4").astype(np.float32)


class F16Format(QuantFormat):
    """2 bytes, IEEE half, little-endian."""

    name, ggml_type, block_size, block_bytes = "F16", 1, 1, 2

    def quantize_rows(self, weights: F32, importance: F32 | None, packed: U8, effort: Effort) -> str:
        if not np.isfinite(weights).all():
            return NOT_FINITE
        if np.abs(weights).max(initial=0) >= 65520:
            return "a weight exceeds float16 (65504); use BF16"
        packed.view("<f2")[:] = weights
        return ""

    def dequantize_rows(self, packed: U8) -> F32:
        return packed.view("<f2").astype(np.float32)


class BF16Format(QuantFormat):
    """2 bytes, the upper half of an IEEE single, little-endian."""

    name, ggml_type, block_size, block_bytes = "BF16", 30, 1, 2

    def quantize_rows(self, weights: F32, importance: F32 | None, packed: U8, effort: Effort) -> str:
        if not np.isfinite(weights).all():
            return NOT_FINITE
        wide = weights.view(np.uint32)
        packed.view("<u2")[:] = (wide + (0x7FFF + ((wide >> 16) & 1))) >> 16
        return "" if np.isfinite(self.dequantize_rows(packed)).all() else "a weight exceeds bfloat16; keep it in F32"

    def dequantize_rows(self, packed: U8) -> F32:
        return (packed.view("<u2").astype(np.uint32) << 16).view(np.float32)
