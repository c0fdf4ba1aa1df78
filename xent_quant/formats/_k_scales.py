"""The 12 bytes of eight 6-bit scales and eight 6-bit minima that Q4_K and Q5_K share (`get_scale_min_k4` in ggml-quants.c)."""

import numpy as np

from xent_quant.compilation import jit
from xent_quant.formats.base import U8


def scales_and_minima(raw: U8) -> tuple[U8, U8]:
    """[n, 12] uint8 to scales and minima, each [n, 8] uint8.

    Bytes 0…3 hold scales 0…3 and, above them, the high two bits of scales 4…7; bytes 4…7 the same of the minima; bytes 8…11
    the low four bits of scales 4…7 and, above them, of minima 4…7.
    """
    a, b, c = raw[:, 0:4], raw[:, 4:8], raw[:, 8:12]
    scales = np.concatenate([a & 63, (c & 15) | ((a >> 6) << 4)], axis=1)
    minima = np.concatenate([b & 63, (c >> 4) | ((b >> 6) << 4)], axis=1)
    return scales, minima


@jit
def pack_scales_and_minima(found, raw):  # type: ignore[no-untyped-def]
    """The inverse, of scales and then minima [n, 16] uint8, into raw [n, 12] uint8."""
    for block in range(len(raw)):
        for i in range(4):
            scale, minimum = found[block, 4 + i], found[block, 12 + i]
            raw[block, i] = found[block, i] | scale >> 4 << 6
            raw[block, 4 + i] = found[block, 8 + i] | minimum >> 4 << 6
            raw[block, 8 + i] = scale & 15 | (minimum & 15) << 4
